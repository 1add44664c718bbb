"""The file that names the workers and the shadow of a main node, and may change while it runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from proto import errors

_STRICT = ConfigDict(frozen=True, extra="forbid")


class WorkerEntry(BaseModel):
    """joules, latency: what an expert costs there, over what it costs on the main node"""

    model_config = _STRICT

    address: str
    joules: PositiveFloat = 1.0
    latency: PositiveFloat = 1.0

    @property
    def cost(self) -> float:
        return self.joules * self.latency


class ShadowEntry(BaseModel):
    model_config = _STRICT

    address: str


class WorkersFile(BaseModel):
    """shadow: None: there is none, or the node's settings name it"""

    model_config = _STRICT

    workers: Annotated[tuple[WorkerEntry, ...], Field(alias="worker")] = ()
    shadow: ShadowEntry | None = None

    @property
    def shadow_address(self) -> str | None:
        return self.shadow.address if self.shadow is not None else None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file and what is wrong with it."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except ValidationError as error:
            raise errors.ConfigInvalid.of(str(path), error) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error
