"""What a computation owes the thread that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compute_node.cache.asked import never


def _nobody() -> bool:
    return False


@dataclass(frozen=True)
class Seat:
    """check:     called between layers and while experts are awaited; raises to give the work up
    gives_way: called between the layers of a prompt; lets others have their turns on this
               very stack, and says whether anybody had one
    """

    check: Callable[[], None] = never
    gives_way: Callable[[], bool] = _nobody
