"""Settings of a shadow node: the [shadow] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from compute_node.config import HelperConfig
from proto.process import daemon


class ShadowConfig(HelperConfig):
    """As `HelperConfig`."""

    node: str = "shadow0"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "shadow", cls)
