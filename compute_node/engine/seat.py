"""What a computation owes the thread that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compute_node.cache.asked import never
from compute_node.moe.step import undivided


def _nobody() -> bool:
    return False


@dataclass(frozen=True)
class Seat:
    """check:     called between layers and while experts are awaited; raises to give the work up
    others_wait: asked between the portions of a prompt: whether others should have their turns now
    give_way:    lets them, on this very stack
    num_portions: asked as a prompt's layer begins: into how many portions its experts are cut
    """

    check: Callable[[], None] = never
    others_wait: Callable[[], bool] = _nobody
    give_way: Callable[[], None] = never
    num_portions: Callable[[], int] = undivided
