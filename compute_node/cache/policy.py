"""What an eviction policy is. Mechanism (budget, pins, the eviction loop) is in expert_cache.py."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import Protocol

from proto.expert import ExpertKey


class EvictionPolicy(Protocol):
    """Keeps an order over experts. Holds no weights and never blocks.

    Time is counted in steps of a layer: one decode step, or one prompt chunk.
    """

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        """One step of `layer` used these experts, hits and misses alike; comes before any
        eviction.
        """
        ...

    def rank(self, key: ExpertKey) -> float:
        """Lower goes first. Pure."""
        ...


def victims(policy: EvictionPolicy, evictable: Iterable[ExpertKey], count: int) -> list[ExpertKey]:
    """The `count` experts to give up next; ties go by key, lowest first. Choosing changes
    nothing.
    """
    return heapq.nsmallest(count, evictable, key=lambda key: (policy.rank(key), key))
