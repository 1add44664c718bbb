"""What a layer computed while it waited for nothing, and what of its reads that could not cover.

Planted faults seen red: waiting counted as compute, time between steps counted, one layer's compute
paying for another, a prompt chunk counted as compute.
"""

from __future__ import annotations

import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.predict.foresight import Settled
from compute_node.predict.layer_timer import LayerTimer
from tests.fakes import FakeLender, make_capacity

LAYERS = (1, 3, 5)


class Watch:
    """A timer whose clock and waiting a test sets."""

    def __init__(self) -> None:
        capacity = make_capacity(8, LAYERS, 2, pooled=True)
        chooser = PolicyChooser("lru", 16.0, LAYERS, 16, lambda: None)
        self.cache = ExpertCache(FakeLender(), capacity, chooser)
        self.cache.waits.read_s = 0.5
        self.now_s = 0.0
        self.told: list[tuple[int, float]] = []
        self.timer = LayerTimer(
            self.cache, lambda *told: self.told.append(told), lambda: self.now_s
        )

    def enter(self, layer: int, now_s: float, stall_s: float = 0.0, unguessed: int = 0) -> None:
        """stall_s: waited since the layer before."""
        self.now_s = now_s
        self.cache.waits.stall_s += stall_s
        self.timer.enter(layer, Settled(set(), [], unguessed))

    @property
    def uncovered_s(self) -> dict[int, float]:
        return {layer: self.cache.counters[layer].uncovered_s for layer in LAYERS}


def test_waiting_is_not_compute() -> None:
    watch = Watch()
    watch.enter(1, 0.0)
    watch.enter(3, 1.0, stall_s=0.75)
    watch.enter(5, 1.5)
    assert watch.told == [(1, 0.25), (3, 0.5)]


def test_unguessed_misses_count_beyond_their_own_layers_compute() -> None:
    """Guessed ones do not count, and compute left over pays for no other layer."""
    watch = Watch()
    watch.enter(1, 0.0, unguessed=3)
    watch.enter(3, 1.25, stall_s=0.25, unguessed=1)
    watch.enter(5, 3.25, unguessed=2)
    assert watch.uncovered_s == pytest.approx({1: 0.5, 3: 0.0, 5: 0.0})


def test_what_lies_between_steps_is_nobodys() -> None:
    watch = Watch()
    watch.enter(5, 0.0, unguessed=9)
    watch.enter(1, 10.0)
    watch.enter(3, 11.0)
    watch.timer.leave()
    watch.enter(5, 99.0)
    assert watch.told == [(1, 1.0)]
    assert watch.uncovered_s == {1: 0.0, 3: 0.0, 5: 0.0}
