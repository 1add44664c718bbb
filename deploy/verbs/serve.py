"""The verb that runs all daemons on this box until it is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deploy.settings import ServeSettings
from deploy.stack.launcher import serving
from deploy.stack.stack_plan import StackPlan
from deploy.terminal import console, options
from deploy.terminal.signals import stop_flag
from proto.quality import EXACT_NAME
from proto.redis_schema import PolicySetting


def serve(
    model: Annotated[Path | None, options.MODEL] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    redis: Annotated[str | None, options.REDIS] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    policy: Annotated[PolicySetting | None, options.POLICY] = None,
    quality: Annotated[str | None, options.DEFAULT_QUALITY] = None,
    forecaster: Annotated[Path | None, options.FORECASTER] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Run all daemons on this box until interrupted; prints one line when ready.

    Example: flashmoe serve --model ~/stores/olmoe --memory 4GiB
    """
    settings = ServeSettings.load(config).with_flags(
        model=model,
        memory=memory,
        experts_memory=experts_memory,
        run_dir=run_dir,
        redis=redis,
        source=source,
        policy=policy,
        quality=quality,
    )
    if forecaster is not None:
        settings = settings.with_forecaster(forecaster)
    plan, stopped = StackPlan.of(settings), stop_flag()
    with serving(plan, stopped, say=console.say) as stack:
        if not stopped():
            console.out.print(
                f"ready: {plan.model_name}, {plan.memory.slots} of {plan.memory.num_experts} "
                f"experts in memory, ceiling {console.size(plan.memory.ceiling_bytes)}, "
                f"run dir {settings.run_dir}{_lossy(settings)}",
            )
        stack.watch(stopped)
    console.say("stopped")


def _lossy(settings: ServeSettings) -> str:
    """What is not exact is announced."""
    quality = settings.default_quality
    return "" if quality == EXACT_NAME else f", lossy within {quality} unless a request says exact"
