"""Settings of a worker: the [worker] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat

from compute_node.config import HelperConfig
from proto.process import daemon
from proto.rpc import TlsFiles


class WorkerConfig(HelperConfig):
    """transport, store_tls: as of a compute node

    fingerprint: of the model that its memory was planned for; None: whichever the store has
    direct_port: at the host of `listen`, for short messages; 0: any that is free
    """

    node: str = "worker0"
    store_tls: TlsFiles | None = None
    transport: Literal["shared_memory", "chunks"] = "shared_memory"
    fingerprint: str | None = None
    half_life_tokens: PositiveFloat = 16.0
    direct_port: Annotated[int, Field(ge=0, le=65535)] = 0

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "worker", cls)
