"""The verb that runs ahead of a main node on another box with a small copy of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deploy.settings import ServeSettings
from deploy.stack.helper import help_main_nodes
from deploy.terminal import options


def shadow(
    model: Annotated[Path | None, options.MODEL] = None,
    listen: Annotated[str | None, options.LISTEN] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Name experts for a main node on another box before it wants them, until interrupted. It needs
    a store of the same checkpoint that fits its memory whole, as `pack --format int4` writes.

    Example: flashmoe shadow --model ~/stores/olmoe-int4 --listen 10.0.0.9:9400 --memory 6GiB
    """
    settings = ServeSettings.load(config).with_flags(
        model=model,
        listen=listen,
        memory=memory,
        experts_memory=experts_memory,
        run_dir=run_dir,
        source=source,
    )
    help_main_nodes(
        settings.of_helper("shadow"), lambda memory: f"all {memory.num_experts} experts in memory"
    )
