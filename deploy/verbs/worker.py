"""The verb that lends this box's memory, disk and processor to a main node on another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deploy.settings import ServeSettings
from deploy.stack.launcher import serving
from deploy.stack.stack_plan import StackPlan
from deploy.terminal import console, options
from deploy.terminal.signals import stop_flag


def worker(
    model: Annotated[Path | None, options.MODEL] = None,
    listen: Annotated[str | None, options.LISTEN] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Compute experts for a main node on another box, until interrupted. It needs a store of the
    same checkpoint; of the checkpoint itself only config.json is read.

    Example: flashmoe worker --model ~/stores/olmoe --listen 10.0.0.2:9400 --memory 2GiB
    """
    settings = ServeSettings.load(config).with_flags(
        model=model,
        listen=listen,
        memory=memory,
        experts_memory=experts_memory,
        run_dir=run_dir,
        source=source,
    )
    plan, stopped = StackPlan.of(settings.of_helper("worker")), stop_flag()
    with serving(plan, stopped, say=console.say) as stack:
        if not stopped():
            console.out.print(
                f"ready: {plan.model_name}, {plan.memory.slots} of {plan.memory.num_experts} "
                f"experts in memory, ceiling {console.size(plan.memory.ceiling_bytes)}, "
                f"for main nodes at {settings.listen}, run dir {settings.run_dir}"
            )
        stack.watch(stopped)
    console.say("stopped")
