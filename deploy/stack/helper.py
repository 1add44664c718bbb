"""Runs the daemons of a box that helps main nodes on others."""

from __future__ import annotations

from collections.abc import Callable

from deploy.plan.budget import MemoryPlan
from deploy.settings import ServeSettings
from deploy.stack.launcher import serving
from deploy.stack.stack_plan import StackPlan
from deploy.terminal import console
from deploy.terminal.signals import stop_flag


def help_main_nodes(settings: ServeSettings, experts_of: Callable[[MemoryPlan], str]) -> None:
    """Until interrupted; prints one line when ready. experts_of: how it says which experts it holds

    Raises what `StackPlan.of` and `serving` raise.
    """
    plan, stopped = StackPlan.of(settings), stop_flag()
    with serving(plan, stopped, say=console.say) as stack:
        if not stopped():
            console.out.print(
                f"ready: {plan.model_name}, {experts_of(plan.memory)}, "
                f"ceiling {console.size(plan.memory.ceiling_bytes)}, "
                f"for main nodes at {settings.listen}, run dir {settings.run_dir}"
            )
        stack.watch(stopped)
    console.say("stopped")
