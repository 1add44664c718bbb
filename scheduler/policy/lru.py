"""Least recently used, array-wise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess
from scheduler.simulate.ranking import Ranks, chosen


class Lru:
    """Evicts what was not used for the most steps."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._num_steps = 0
        self._last_used = np.zeros(shape, np.int64)  # 1-based step; 0: never

    def observe(self, event: DecodeAccess) -> None:
        self._num_steps += 1
        self._last_used[chosen(event)] = self._num_steps

    def ages(self) -> NDArray[np.int64]:
        """[L, E], steps since each was used."""
        return self._num_steps - self._last_used

    def ranks(self) -> Ranks:
        return -self.ages().astype(np.float64)
