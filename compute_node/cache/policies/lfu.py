"""Least frequently used, counts kept across evictions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

from proto.expert import ExpertKey


class Lfu:
    """Evicts what was used in the fewest steps, ever."""

    def __init__(self) -> None:
        self._count: defaultdict[int, Counter[int]] = defaultdict(Counter)  # layer, expert

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        count = self._count[layer]
        for key in used:
            count[key.expert] += 1

    def rank(self, key: ExpertKey) -> float:
        return self._count[key.layer][key.expert]
