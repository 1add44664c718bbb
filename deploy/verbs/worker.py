"""The verb that lends this box's memory, disk and processor to a main node on another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deploy.settings import ServeSettings
from deploy.stack.helper import help_main_nodes
from deploy.terminal import options


def worker(
    model: Annotated[Path | None, options.MODEL] = None,
    store: Annotated[str | None, options.LENT_STORE] = None,
    listen: Annotated[str | None, options.LISTEN] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    lend: Annotated[str | None, options.LEND] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Compute experts for a main node on another box, until interrupted. It needs a store of the
    same checkpoint, of which only config.json is read; or, with --store, none: then it borrows from
    a box that lends.

    Example: flashmoe worker --model ~/stores/olmoe --listen 10.0.0.2:9400 --memory 2GiB
    """
    settings = ServeSettings.load(config).borrowing(store, model)
    settings = settings.with_flags(
        listen=listen,
        memory=memory,
        experts_memory=experts_memory,
        run_dir=run_dir,
        source=source,
        lend=lend,
    )
    borrowed = f", borrowed from {settings.store}" if settings.store is not None else ""
    help_main_nodes(
        settings.of_helper("worker"),
        lambda memory: f"{memory.slots} of {memory.num_experts} experts in memory{borrowed}",
    )
