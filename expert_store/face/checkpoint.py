"""What a store says of the checkpoint whose experts it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expert_store.manifest.manifest import Manifest

_CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """folder: where config, tokenizer and dense weights are

    config: the bytes of its config.json; empty when it has none
    share: which share of the model the store is; empty: it is whole
    """

    folder: Path
    config: bytes
    hidden_size: int
    share: str = ""

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> Checkpoint:
        """Raises OSError for a config that is there and cannot be read."""
        path = folder / _CONFIG_NAME
        config = path.read_bytes() if path.exists() else b""
        share = "" if manifest.share is None else str(manifest.share)
        return cls(folder, config, manifest.sizing.hidden_size, share)
