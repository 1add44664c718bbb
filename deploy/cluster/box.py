"""A box of cluster.toml: what it may use, and what it does for the others."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deploy.settings import parse_bytes
from expert_store.manifest.share import Share
from proto import errors

STRICT = ConfigDict(frozen=True, extra="forbid")
NAMED_FOR_RAY = {"localhost", "127.0.0.1", "0.0.0.0", "::"}
_TABLES = ("expert_store", "compute_node", "scheduler", "gateway", "worker", "shadow")


def _start_at_file(path: Path, info: ValidationInfo) -> Path:
    """A relative one; `~` stays, as the home is that of the box."""
    if str(path).startswith("~") or not isinstance(info.context, Path):
        return path
    return info.context.resolve() / path


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
PathOfBox = Annotated[Path, AfterValidator(_start_at_file)]


class Box(BaseModel):
    """What every box has.

    host: its address, by which Ray and other boxes know it
    memory: ceiling over everything on the box, Ray's own processes included
    ray_memory: what of it is set apart for them; None: as measured
    lend_port: where its store lends to workers that have none, if there are any
    tables: of daemons, as in flashmoe.toml
    """

    model_config = STRICT

    name: Name
    host: str
    memory: str
    ray_memory: str | None = None
    experts_memory: str | None = None
    model: PathOfBox | None = None
    source: PathOfBox | None = None
    run_dir: PathOfBox | None = None
    lend_port: Port = 9500
    tables: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "ca":
            raise ValueError("the files of the certificate authority are called so")
        return name

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if host in NAMED_FOR_RAY:
            raise ValueError(
                "Ray takes it for any address of the machine: write the one that other boxes "
                "reach, or 127.0.0.2 and up for boxes on one machine"
            )
        ip_address(host)
        return host

    @field_validator("tables")
    @classmethod
    def _check_tables(cls, tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if unknown := sorted(tables.keys() - set(_TABLES)):
            raise ValueError(f"no daemon is called {unknown[0]!r}: they are {', '.join(_TABLES)}")
        return tables

    @field_validator("memory", "ray_memory")
    @classmethod
    def _check_size(cls, size: str | None) -> str | None:
        if size is not None:
            try:
                parse_bytes(size, "it")
            except errors.ConfigInvalid as error:
                raise ValueError(str(error)) from None
        return size

    def at(self, port: int) -> str:
        """Its address with a port."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @property
    def folder(self) -> Path:
        """Where its stack runs, on that box."""
        return self.run_dir or Path("~/.flashmoe/cluster") / self.name


class OwnerBox(Box):
    """A box that computes experts. share, copies: what of them its store has, as `flashmoe shard`
    makes it; none: as its store says, where that is here, else all. For `flashmoe plan` alone
    """

    share: str | None = None
    copies: PositiveInt = 1

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        try:
            _ = self.share_of_model
        except errors.ConfigInvalid as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def cost(self) -> float:
        """Of an expert there, over what it is on the main box."""
        return 1.0

    @property
    def share_of_model(self) -> Share | None:
        return None if self.share is None else Share.parse(self.share, self.copies, "share")


class MainBox(OwnerBox):
    """The box that answers. http, api_key_file, quality, policy: as of `flashmoe serve`."""

    name: Name = "main"
    http: str | None = None
    api_key_file: PathOfBox | None = None
    quality: str | None = None
    policy: str | None = None


class HelperBox(Box):
    """A box that helps the main one. port: where it listens for it"""

    port: Port = 9400

    @property
    def address(self) -> str:
        return self.at(self.port)


class WorkerBox(HelperBox, OwnerBox):
    """A box that computes experts for the main one.

    joules, latency: what an expert costs there, over what it costs on the main box
    store: the box whose store it borrows from; None: it has one
    """

    joules: PositiveFloat = 1.0
    latency: PositiveFloat = 1.0
    store: Name | None = None

    @property
    def cost(self) -> float:
        return self.joules * self.latency


class ShadowBox(HelperBox):
    """A box that names experts for the main one. model: its small copy of the model"""

    name: Name = "shadow"
    model: PathOfBox


AnyBox = MainBox | HelperBox
