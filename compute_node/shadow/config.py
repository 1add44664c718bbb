"""Settings of a shadow node: the [shadow] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from proto.process import daemon
from proto.rpc import Listen, TlsFiles


class ShadowConfig(BaseModel):
    """Frozen and strict: an unknown key stops the daemon and is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    listen: str | None = None
    node: str = "shadow0"
    store_address: str
    session_dir: Path
    model_dir: Path | None = None
    slots: PositiveInt
    deadline_s: PositiveFloat = 30.0
    threads: Annotated[int, Field(ge=0)] = 0
    verdicts_path: Path | None = None
    native: Literal["auto", "portable", "off"] = "auto"
    tls: TlsFiles | None = None
    insecure: bool = False
    stop_grace_s: PositiveFloat = 5.0
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_port_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @property
    def faces(self) -> list[Listen]:
        """Where it serves: for its own box, and for main nodes on others."""
        faces = [Listen(self.address)]
        if self.listen is not None:
            faces.append(Listen(self.listen, self.tls, self.insecure))
        return faces

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "shadow", cls)
