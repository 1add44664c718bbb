"""Frequency over recency, f / (age + 1), array-wise."""

from __future__ import annotations

from proto.access import DecodeAccess
from scheduler.policy.lfu import Lfu
from scheduler.policy.lru import Lru
from scheduler.simulate.ranking import Ranks


class Lfru:
    """Evicts the smallest count per step of age."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._recency = Lru(shape)
        self._frequency = Lfu(shape)

    def observe(self, event: DecodeAccess) -> None:
        self._recency.observe(event)
        self._frequency.observe(event)

    def ranks(self) -> Ranks:
        return self._frequency.ranks() / (self._recency.ages() + 1)
