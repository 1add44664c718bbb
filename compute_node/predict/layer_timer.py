"""Times the layers of decode steps: compute without waiting, and reads it could not cover."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from compute_node.cache.expert_cache import ExpertCache


@dataclass
class LayerTimer:
    """Watches decode steps pass from layer to layer. One thread.

    tell:  called with each layer and its compute, in seconds
    clock: seconds
    """

    cache: ExpertCache
    tell: Callable[[int, float], None] = lambda layer, compute_s: None
    clock: Callable[[], float] = time.perf_counter
    _layer: int | None = None
    _start_s: float = 0.0
    _stall_s: float = 0.0
    _unguessed: int = 0

    def enter(self, layer: int, num_unguessed: int) -> None:
        """A decode step reaches `layer`. num_unguessed: its misses that nobody guessed"""
        now_s, stall_s = self.clock(), self.cache.stall_s
        if self._layer is not None and layer > self._layer:  # else a step began anew
            compute_s = now_s - self._start_s - (stall_s - self._stall_s)
            self.tell(self._layer, compute_s)
            uncovered_s = self._unguessed * self.cache.read_s - compute_s
            self.cache.counters[self._layer].uncovered_s += max(0.0, uncovered_s)
        self._layer, self._start_s, self._stall_s = layer, now_s, stall_s
        self._unguessed = num_unguessed

    def leave(self) -> None:
        """A step that is no decode step begins."""
        self._layer = None
