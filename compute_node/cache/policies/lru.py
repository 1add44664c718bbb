"""Least recently used."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

from proto.expert import ExpertKey


class Lru:
    """Evicts what was not used for the most steps of its layer."""

    def __init__(self) -> None:
        self._clock: Counter[int] = Counter()
        self._last_used: defaultdict[int, dict[int, int]] = defaultdict(dict)  # layer, expert

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        self._clock[layer] += 1
        last_used, now = self._last_used[layer], self._clock[layer]
        for key in used:
            last_used[key.expert] = now

    def age(self, key: ExpertKey) -> int:
        """Steps of its layer since it was used."""
        return self._clock[key.layer] - self._last_used[key.layer].get(key.expert, 0)

    def rank(self, key: ExpertKey) -> float:
        return -self.age(key)
