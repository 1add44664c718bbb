"""Settings of the expert store: the [expert_store] table of flashmoe.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from proto import errors
from proto.rpc import Listen, TlsFiles


class ExpertStoreConfig(BaseModel):
    """Frozen and strict: an unknown key stops the daemon and is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    store_dir: Path
    source_root: Path | None = None
    segment_path: Path
    session_dir: Path
    num_slots: PositiveInt
    read_depth: Annotated[int, Field(ge=1, le=64)] = 4
    max_queued_reads: PositiveInt = 4096
    direct_io: bool = True
    lock_poll_s: PositiveFloat = 0.1
    restart_wait_s: PositiveFloat = 60.0
    stop_grace_s: PositiveFloat = 5.0
    tls: TlsFiles | None = None
    insecure: bool = False
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_port_file: Path | None = None
    log_level: str = "INFO"

    @property
    def listen(self) -> Listen:
        return Listen(self.address, self.tls, self.insecure)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        try:
            table = tomllib.loads(path.read_text())["expert_store"]
            return cls.model_validate(table)
        except KeyError as error:
            raise errors.ConfigInvalid(f"{path} has no table [expert_store]: add one") from error
        except ValidationError as error:
            raise errors.ConfigInvalid.of(f"{path}, table [expert_store]", error) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error
