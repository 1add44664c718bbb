"""How long a cache waits for experts, and how long reading one takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from compute_node.cache.counters import LayerCounters
from compute_node.store.memory import Borrowed
from proto.stats import fact

_SMOOTHING = 0.1


@dataclass
class Waits:
    """Of one cache. One thread.

    counters: by layer; their waiting is counted here
    read_s: seconds that reading one exact record takes, of the latest that were read alone (running
            mean)
    read_s_per_byte: the same, a byte, of small records, too
    stall_s: waiting for experts, all layers
    away_s:  waiting for other boxes that read, all layers
    on_wait: hears of each wait: layer, seconds, what came at its end
    """

    counters: Mapping[int, LayerCounters]
    read_s: float = fact("seconds that a read takes", key="expert_read_s", start=0.0)
    read_s_per_byte: float = 0.0
    stall_s: float = 0.0
    away_s: float = 0.0
    on_wait: Callable[[int, float, Sequence[Borrowed]], None] = lambda layer, waited_s, came: None

    @contextmanager
    def waiting(self, layer: int) -> Iterator[list[Borrowed]]:
        """The block waits, and adds what came to the list that it gets."""
        start_s, came = time.perf_counter(), list[Borrowed]()
        try:
            yield came
        finally:
            waited_s = time.perf_counter() - start_s
            self.counters[layer].stall_s += waited_s
            self.stall_s += waited_s
            self.on_wait(layer, waited_s, came)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The block waits for another box."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.away_s += time.perf_counter() - start_s

    def time_read(self, borrowed: Borrowed) -> None:
        """It was read alone."""
        per_byte = borrowed.read_s / borrowed.bytes_read
        share = _SMOOTHING if self.read_s_per_byte else 1.0
        self.read_s_per_byte += share * (per_byte - self.read_s_per_byte)
        if borrowed.is_exact:
            share = _SMOOTHING if self.read_s else 1.0
            self.read_s += share * (borrowed.read_s - self.read_s)
