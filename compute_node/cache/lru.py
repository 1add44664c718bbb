"""Least recently used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from proto.expert import ExpertKey


class Lru:
    """Evicts what was not used for the most steps of its layer."""

    def __init__(self) -> None:
        self._clock: Counter[int] = Counter()
        self._last_used: dict[ExpertKey, int] = {}

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        self._clock[layer] += 1
        for key in used:
            self._last_used[key] = self._clock[layer]

    def age(self, key: ExpertKey) -> int:
        """Steps of its layer since it was used."""
        return self._clock[key.layer] - self._last_used.get(key, 0)

    def rank(self, key: ExpertKey) -> float:
        return -self.age(key)
