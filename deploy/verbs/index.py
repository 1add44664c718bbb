"""The verb that writes a manifest over a checkpoint in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deploy.report.written_store import print_written
from deploy.terminal import console, options
from deploy.terminal.imports import importing_torch
from deploy.terminal.progress import progress


def index(
    checkpoint: Annotated[Path, options.CHECKPOINT], out: Annotated[Path, options.OUT]
) -> None:
    """Write a manifest over a checkpoint in place: no copy of its weights.

    Reads every byte once for the checksums; interrupted, it goes on where it was.

    Example: flashmoe index ~/models/OLMoE-1B-7B --out ~/stores/olmoe
    """
    with importing_torch():
        from expert_store.offline.index import index as make_index
        from expert_store.offline.index import is_indexed

    if is_indexed(checkpoint, out):
        console.err.print(f"{out} is up to date")
        return
    with progress("indexing") as report:
        manifest = make_index(checkpoint, out, report, console.warn)
    print_written(manifest, out)
