"""Settings of a worker: the [worker] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import PositiveFloat

from compute_node.config import HelperConfig
from proto.process import daemon


class WorkerConfig(HelperConfig):
    """As `HelperConfig`."""

    node: str = "worker0"
    half_life_tokens: PositiveFloat = 16.0

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "worker", cls)
