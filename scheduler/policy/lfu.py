"""Least frequently used, counts kept across evictions, array-wise."""

from __future__ import annotations

import numpy as np

from proto.access import DecodeAccess
from scheduler.simulate.ranking import Ranks, chosen


class Lfu:
    """Evicts what was used in the fewest steps, ever."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._count = np.zeros(shape, np.float64)

    def observe(self, event: DecodeAccess) -> None:
        self._count[chosen(event)] += 1

    def ranks(self) -> Ranks:
        return self._count.copy()
