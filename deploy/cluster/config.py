"""cluster.toml: which boxes serve one model together, and what each may use."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from deploy.cluster.box import (
    NAMED_FOR_RAY,
    STRICT,
    AnyBox,
    Box,
    HelperBox,
    MainBox,
    PathOfBox,
    Port,
    ShadowBox,
    WorkerBox,
)
from deploy.settings import parse_bytes
from proto import errors
from proto.rpc import is_loopback

LOCAL, AUTO = "local", "auto"
LOCAL_PORT = 6385
_RAY_MEMORY, _HEAD_MEMORY = "288MiB", "448MiB"  # a box of Ray, and the one with its head
_EXAMPLE = "deploy/cluster/cluster.toml"


class Head(BaseModel):
    """Of Ray. state_dir: where its Valkey keeps what the cluster is; state_port: of that Valkey"""

    model_config = STRICT

    state_dir: PathOfBox = Path("~/.flashmoe/cluster/head")
    state_port: Port = 6386


class ClusterConfig(BaseModel):
    """Frozen and strict. Paths in it are those of the boxes; relative ones start at the file.

    model: the store, on every box that names no other
    ray: `auto` (the cluster that this box is in), HOST:PORT of its head, or `local`
    certs: folder that `flashmoe cluster certs` wrote; insecure: boxes speak in the clear
    """

    model_config = STRICT

    model: PathOfBox
    ray: str = AUTO
    certs: PathOfBox | None = None
    insecure: bool = False
    head: Head = Head()
    main: MainBox
    workers: Annotated[tuple[WorkerBox, ...], Field(alias="worker")] = ()
    shadow: ShadowBox | None = None

    @classmethod
    def load(cls, path: Path, is_protected: bool = True) -> Self:
        """is_protected: what is reachable from other hosts must be

        Raises ConfigInvalid naming the file, the key and what is wrong with it.
        """
        try:
            document = tomllib.loads(path.read_text())
            if not is_protected:
                document.setdefault("insecure", True)
            return cls.model_validate(document, context=path.parent)
        except ValidationError as error:
            raise errors.ConfigInvalid.of(str(path), error, _EXAMPLE) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error

    @field_validator("ray")
    @classmethod
    def _check_ray(cls, ray: str) -> str:
        if ray in (AUTO, LOCAL):
            return ray
        host, colon, port = ray.rpartition(":")
        if not colon or not port.isdecimal() or host in NAMED_FOR_RAY:
            raise ValueError("write auto, local, or HOST:PORT of Ray's head as 10.0.0.1:6379")
        return ray

    @model_validator(mode="after")
    def _check_boxes(self) -> Self:
        names = [box.name for box in self.boxes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two boxes are called {min(twice)}: give each a name of its own")
        addresses = [box.address for box in self.helpers]
        if again := {one for one in addresses if addresses.count(one) > 1}:
            raise ValueError(f"two boxes listen at {min(again)}: give each a port of its own")
        return self

    @model_validator(mode="after")
    def _check_stores(self) -> Self:
        lend = [self.main.name, *(one.name for one in self.workers if one.store is None)]
        for worker in self.workers:
            if worker.store is None:
                continue
            if worker.store not in lend:
                raise ValueError(
                    f"box {worker.name} borrows from {worker.store}, which has no store of the "
                    f"model: name one of {', '.join(lend)}"
                )
            if any(one is not None for one in (worker.model, worker.source, worker.share)):
                raise ValueError(
                    f"box {worker.name} borrows from {worker.store}: leave its model, source and "
                    "share out"
                )
        return self

    @model_validator(mode="after")
    def _check_exposure(self) -> Self:
        open_hosts = [box.host for box in self.boxes if not is_loopback(f"{box.host}:0")]
        if open_hosts and self.certs is None and not self.insecure:
            raise ValueError(
                f"{open_hosts[0]} is reachable from other hosts: set certs to what `flashmoe "
                "cluster certs` wrote, or insecure = true"
            )
        elsewhere = [host for host in open_hosts if host != self.main.host]
        if self.ray == LOCAL and elsewhere:
            raise ValueError(
                f"ray = local is for boxes on one machine, and {elsewhere[0]} may be another's "
                "address: write the head's HOST:PORT"
            )
        return self

    @property
    def helpers(self) -> tuple[HelperBox, ...]:
        """Workers, and the shadow if there is one."""
        return (*self.workers, *([] if self.shadow is None else [self.shadow]))

    @property
    def boxes(self) -> tuple[AnyBox, ...]:
        """The main one first."""
        return (self.main, *self.helpers)

    def lender_of(self, box: Box) -> MainBox | WorkerBox | None:
        """The box whose store it borrows from; None: it has a store."""
        name = box.store if isinstance(box, WorkerBox) else None
        owners: tuple[MainBox | WorkerBox, ...] = (self.main, *self.workers)
        return next((one for one in owners if one.name == name), None)

    @property
    def starts(self) -> tuple[tuple[AnyBox, ...], ...]:
        """Boxes that start together, the first ones first: helpers before the main one, which waits
        for none long, and those that borrow from the main one with it.
        """
        borrowers = [box for box in self.workers if box.store == self.main.name]
        others = [box for box in self.helpers if box not in borrowers]
        return (*others,), (self.main, *borrowers)

    def lends(self, box: Box) -> bool:
        """Whether workers borrow from its store."""
        return box.name in {worker.store for worker in self.workers}

    @property
    def ray_address(self) -> str:
        """As `ray.init` takes it."""
        return f"{self.main.host}:{LOCAL_PORT}" if self.ray == LOCAL else self.ray

    @property
    def head_box(self) -> AnyBox:
        """Where Ray's head runs. Raises ConfigInvalid when the file does not say, or it is no box
        of the file.
        """
        if self.ray == AUTO:
            raise errors.ConfigInvalid("ray = auto names no head: write its HOST:PORT, or local")
        host = self.ray_address.rpartition(":")[0].strip("[]")
        for box in self.boxes:
            if box.host == host:
                return box
        raise errors.ConfigInvalid(f"ray = {self.ray} is the address of none of the boxes")

    @property
    def head_port(self) -> int:
        return int(self.ray_address.rpartition(":")[2])

    def stack_memory_bytes(self, box: Box) -> int:
        """What the daemons of the box may use. Raises ConfigInvalid when Ray leaves nothing."""
        runs_head = self.ray != AUTO and box.host == self.ray_address.rpartition(":")[0]
        ray = box.ray_memory or (_HEAD_MEMORY if runs_head else _RAY_MEMORY)
        left_bytes = parse_bytes(box.memory, "memory") - parse_bytes(ray, "ray_memory")
        if left_bytes <= 0:
            raise errors.ConfigInvalid(
                f"box {box.name}: of memory {box.memory} Ray needs {ray}, which leaves nothing: "
                "raise memory"
            )
        return left_bytes

    def box(self, name: str) -> AnyBox:
        """Raises ConfigInvalid for a name that no box has."""
        for box in self.boxes:
            if box.name == name:
                return box
        known = ", ".join(box.name for box in self.boxes)
        raise errors.ConfigInvalid(f"no box is called {name}: the file names {known}")
