"""The verb that reads and checks every byte of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.terminal import console, options
from deploy.terminal.progress import progress


def verify(
    store: Annotated[Path, options.STORE], source: Annotated[Path | None, options.SOURCE] = None
) -> None:
    """Read and check every expert and dense weight; name each damaged one, then exit 1.

    Example: flashmoe verify ~/stores/olmoe
    """
    from expert_store.offline.verify import verify as check

    with progress("verifying") as report:
        damage = check(store, source, report)
    for item in damage:
        console.out.print(f"{item.name} in {item.file}: {item.problem}")
    if damage:
        console.err.print(
            f"{len(damage)} damaged: restore the files named above, then verify again"
        )
        raise typer.Exit(console.DAMAGED)
    console.out.print(f"{store}: every expert and weight is as it was indexed")
