"""boxes.toml: what the boxes are that `flashmoe simulate` decodes on."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from deploy.settings import parse_bytes
from deploy.simulator.box import BoxSpec
from deploy.simulator.setting import Link
from expert_store.manifest.share import Share
from proto import errors

EXAMPLE = "deploy/simulator/boxes.toml"
_STRICT = ConfigDict(frozen=True, extra="forbid")


class LinkTable(BaseModel):
    """Between the main box and others. message_ms, serial_ms: see `Link`"""

    model_config = _STRICT

    round_trip_ms: NonNegativeFloat = 0.3
    megabits_per_s: PositiveFloat = 1000.0
    message_ms: NonNegativeFloat = 0.0
    serial_ms: NonNegativeFloat = 0.0

    def link(self) -> Link:
        return Link(
            self.round_trip_ms / 1e3,
            self.megabits_per_s * 1e6,
            self.message_ms / 1e3,
            self.serial_ms / 1e3,
        )


class BoxTable(BaseModel):
    """memory: for experts; share, copies: of the experts, what its disk has, as `flashmoe shard`
    makes it (none: all); the units of the rest are in the names
    """

    model_config = _STRICT

    memory: str
    disk_mb_per_s: PositiveFloat
    disk_read_ms: NonNegativeFloat = 0.0
    weights_gb_per_s: PositiveFloat
    expert_ms: NonNegativeFloat = 0.0
    watts: NonNegativeFloat = 0.0
    computing_watts: NonNegativeFloat = 0.0
    reading_watts: NonNegativeFloat = 0.0
    share: str | None = None
    copies: PositiveInt = 1

    @field_validator("memory")
    @classmethod
    def _check_size(cls, size: str) -> str:
        try:
            parse_bytes(size, "it")
        except errors.ConfigInvalid as error:
            raise ValueError(str(error)) from None
        return size

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        try:
            self.nth_share(0)
        except errors.ConfigInvalid as error:
            raise ValueError(str(error)) from None
        return self

    def nth_share(self, number: int) -> Share | None:
        """Of several such boxes: the first has `share`, each other the one that follows."""
        if self.share is None:
            return None
        first = Share.parse(self.share, self.copies, "share")
        return replace(first, owner=(first.owner - 1 + number) % first.owners + 1)

    def spec(self, name: str, cost: float = 1.0, number: int = 0) -> BoxSpec:
        """number: of the box among such boxes, from 0"""
        return BoxSpec(
            name,
            parse_bytes(self.memory, "memory"),
            self.disk_mb_per_s * 1e6,
            self.weights_gb_per_s * 1e9,
            self.disk_read_ms / 1e3,
            self.expert_ms / 1e3,
            cost,
            self.watts,
            self.computing_watts,
            self.reading_watts,
            self.nth_share(number),
        )


class MainTable(BoxTable):
    """layer_ms: of a layer, beside the bytes of its dense part"""

    layer_ms: NonNegativeFloat = 0.0


class WorkerTable(BoxTable):
    """count: of such boxes; joules, latency: as of cluster.toml, by which they get fewer experts"""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")] = "worker"
    count: PositiveInt = 1
    joules: PositiveFloat = 1.0
    latency: PositiveFloat = 1.0


class BoxesFile(BaseModel):
    """Frozen and strict."""

    model_config = _STRICT

    link: LinkTable = LinkTable()
    main: MainTable
    workers: Annotated[tuple[WorkerTable, ...], Field(alias="worker")] = ()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except ValidationError as error:
            raise errors.ConfigInvalid.of(str(path), error, EXAMPLE) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error

    def boxes(self, count: int, joules: float = 1.0) -> list[BoxSpec]:
        """The main one, and workers in their order. joules: times that of each worker

        Raises InvalidRequest where there are fewer.
        """
        found = [self.main.spec("main")]
        for table in self.workers:
            cost = table.joules * table.latency * joules
            found += [table.spec(f"{table.name}-{n + 1}", cost, n) for n in range(table.count)]
        if not 0 < count <= len(found):
            raise errors.InvalidRequest(
                f"the file has {len(found)} boxes, not {count}: give a worker a larger `count`"
            )
        return found[:count]
