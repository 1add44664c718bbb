"""Exponentially decayed frequency, array-wise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess
from scheduler.policy.lru import Lru
from scheduler.simulate.ranking import Ranks, chosen


class Decayed:
    """Evicts the smallest count, where a use loses half its worth every `half_life_tokens` steps.

    The node's twin takes powers with math.pow; the table holds the same, so both agree to the bit.
    """

    def __init__(self, shape: tuple[int, int], half_life_tokens: float = 16.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life_tokens)
        self._recency = Lru(shape)
        self._worth = np.zeros(shape, np.float64)  # at the step of its last use
        self._powers = np.ones(1)

    def observe(self, event: DecodeAccess) -> None:
        at = chosen(event)
        self._worth[at] *= self._power(self._recency.ages()[at] + 1)
        self._worth[at] += 1.0
        self._recency.observe(event)

    def ranks(self) -> Ranks:
        ranks: Ranks = self._worth * self._power(self._recency.ages())
        return ranks

    def _power(self, ages: NDArray[np.int64]) -> Ranks:
        oldest = int(ages.max())
        if oldest >= len(self._powers):
            powers = [math.pow(self._decay, age) for age in range(2 * oldest + 64)]
            self._powers = np.array(powers)
        taken: Ranks = self._powers[ages]
        return taken
