"""How `index` and `pack` begin: the checkpoint is opened, its model run dry, its text tried."""

from __future__ import annotations

from pathlib import Path

from expert_store.offline.checkpoint.architecture import Architecture, read_architecture
from expert_store.offline.checkpoint.files import Checkpoint
from expert_store.offline.checkpoint.progress import Warn
from expert_store.offline.checkpoint.text_check import check_text


def open_checkpoint(root: Path, warn: Warn) -> tuple[Checkpoint, Architecture]:
    """Reads no weights. Raises CheckpointUnsupported, ManifestInvalid (a shard missing or
    damaged).
    """
    checkpoint = Checkpoint.open(root, warn)
    architecture = read_architecture(root, checkpoint.tensors)
    check_text(root, architecture.model, warn)
    return checkpoint, architecture
