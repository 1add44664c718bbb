"""The verb that copies a share of a store's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.report.written_store import print_written
from deploy.terminal import options
from deploy.terminal.progress import progress
from expert_store.manifest.share import Share

OWNER = typer.Option(
    metavar="I/N", help="Which share: 1/3 is the first of three.", show_default=False
)
COPIES = typer.Option(metavar="C", help="Of how many of the shares each expert is in.")


def shard(
    store: Annotated[Path, options.STORE],
    owner: Annotated[str, OWNER],
    out: Annotated[Path, options.OUT],
    copies: Annotated[int, COPIES] = 1,
    source: Annotated[Path | None, options.SOURCE] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
) -> None:
    """Copy the experts of one of N boxes into a store for `flashmoe worker`: of every layer about
    one in N. All N shares together have every expert, in C shares each; with --copies 2 the boxes
    have every expert still when one of them fails.

    STORE may be packed or an index in place. Dense weights, config and tokenizer come along.
    Killed, it resumes; a full disk leaves the folder as it was.

    Example: flashmoe shard ~/stores/olmoe --owner 1/3 --out /nvme/olmoe-1-of-3
    """
    from expert_store.offline.shard import shard as make_shard

    share = Share.parse(owner, copies)
    with progress("copying") as report:
        manifest = make_shard(store, share, out, source, report, overwrite=overwrite)
    print_written(manifest, out)
