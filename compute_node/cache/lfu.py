"""Least frequently used, counts kept across evictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from proto.expert import ExpertKey


class Lfu:
    """Evicts what was used in the fewest steps, ever."""

    def __init__(self) -> None:
        self._count: Counter[ExpertKey] = Counter()

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        self._count.update(used)

    def rank(self, key: ExpertKey) -> float:
        return self._count[key]
