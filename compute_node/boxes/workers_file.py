"""The file that says which workers a main node has, and may change while it runs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from proto import errors


class WorkerEntry(BaseModel):
    """joules, latency: what an expert costs there, over what it costs on the main node"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    joules: PositiveFloat = 1.0
    latency: PositiveFloat = 1.0

    @property
    def cost(self) -> float:
        return self.joules * self.latency


class _Workers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    worker: tuple[WorkerEntry, ...] = Field(default=())


def read_workers(path: Path) -> tuple[WorkerEntry, ...]:
    """Raises ConfigInvalid naming the file and what is wrong with it."""
    try:
        return _Workers.model_validate(tomllib.loads(path.read_text())).worker
    except ValidationError as error:
        raise errors.ConfigInvalid.of(str(path), error) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error
