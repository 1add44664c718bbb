"""What an eviction policy is. Mechanism (capacity, pins, the loop) is in expert_cache.py."""

from __future__ import annotations

from collections.abc import Collection
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
        """Lower goes first. Pure; changes only with a step of the expert's own layer."""
        ...
