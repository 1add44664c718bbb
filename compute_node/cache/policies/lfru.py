"""Frequency over recency: f / (age + 1)."""

from __future__ import annotations

from collections.abc import Collection

from compute_node.cache.policies.lfu import Lfu
from compute_node.cache.policies.lru import Lru
from proto.expert import ExpertKey


class Lfru:
    """Evicts the smallest count per step of age."""

    def __init__(self) -> None:
        self._recency = Lru()
        self._frequency = Lfu()

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        self._recency.on_step(layer, used)
        self._frequency.on_step(layer, used)

    def rank(self, key: ExpertKey) -> float:
        return self._frequency.rank(key) / (self._recency.age(key) + 1)
