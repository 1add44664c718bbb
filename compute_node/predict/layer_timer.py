"""Times the layers of decode steps: compute without waiting, reads it could not cover, and what was
waited for why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from compute_node.cache.expert_cache import ExpertCache
from compute_node.predict.foresight import Settled
from compute_node.predict.stalls import Stalls


@dataclass
class LayerTimer:
    """Watches decode steps pass from layer to layer. One thread.

    tell:   called with each layer and its compute, in seconds
    clock:  seconds
    stalls: hears of the cache's waits
    """

    cache: ExpertCache
    tell: Callable[[int, float], None] = lambda layer, compute_s: None
    clock: Callable[[], float] = time.perf_counter
    stalls: Stalls = field(default_factory=Stalls)
    _layer: int | None = None
    _start_s: float = 0.0
    _stall_s: float = 0.0
    _unguessed: int = 0

    def __post_init__(self) -> None:
        self.cache.waits.on_wait = self.stalls.waited

    def enter(self, layer: int, settled: Settled) -> None:
        """A decode step reaches `layer`. settled: what came of the guesses about it"""
        now_s, stall_s = self.clock(), self.cache.waits.stall_s
        if self._layer is not None and layer > self._layer:  # else a step began anew
            compute_s = now_s - self._start_s - (stall_s - self._stall_s)
            self.tell(self._layer, compute_s)
            uncovered_s = self._unguessed * self.cache.waits.read_s - compute_s
            self.cache.counters[self._layer].uncovered_s += max(0.0, uncovered_s)
        self._layer, self._start_s, self._stall_s = layer, now_s, stall_s
        self._unguessed = settled.num_unforeseen
        self.stalls.enter(layer, settled.foreseen)

    def leave(self) -> None:
        """A step that is no decode step begins."""
        self._layer = None
        self.stalls.leave()
