"""What one phase of one request cost: tokens, hits, bytes, waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from compute_node.cache.expert_cache import ExpertCache
from compute_node.moe.step import Step


@dataclass
class Usage:
    """Of one phase of one request.

    stall_s:     of wall_s, waiting for experts
    uncovered_s: reading the misses that nobody guessed, beyond their own layer's compute
    device_s:    bytes_read at the device's speed
    substituted: chosen experts that gave way to others
    skipped:     chosen experts that were left out
    small:       experts computed with a record of fewer bits
    checks:      tokens that were computed exactly, too, to compare
    check_s:     of wall_s, spent on that
    check_bytes: read for it, beside bytes_read
    """

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    wall_s: float = 0.0
    uncovered_s: float = 0.0
    device_s: float = 0.0
    substituted: int = 0
    skipped: int = 0
    small: int = 0
    checks: int = 0
    check_s: float = 0.0
    check_bytes: int = 0

    def count(self, step: Step) -> None:
        """What the step's route changed."""
        self.substituted += step.num_substituted
        self.skipped += step.num_skipped
        self.small += step.num_small


class Measure:
    """Adds what a block cost to a usage, also when it raises. Enter it as often as need be."""

    def __init__(self, cache: ExpertCache, usage: Usage) -> None:
        self._cache, self._usage = cache, usage

    def __enter__(self) -> None:
        self._before = self._totals()
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        usage, after = self._usage, self._totals()
        usage.wall_s += time.perf_counter() - self._start_s
        usage.hits += after[0] - self._before[0]
        usage.misses += after[1] - self._before[1]
        usage.bytes_read += after[2] - self._before[2]
        usage.stall_s += after[3] - self._before[3]
        usage.uncovered_s += after[4] - self._before[4]
        usage.device_s += (after[2] - self._before[2]) * self._cache.waits.read_s_per_byte

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What this block costs, within the one that is measured, is not counted."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _totals(self) -> tuple[int, int, int, float, float]:
        counters = self._cache.counters.values()
        return (
            sum(c.hits for c in counters),
            sum(c.misses for c in counters),
            sum(c.bytes_read for c in counters),
            sum(c.stall_s for c in counters),
            sum(c.uncovered_s for c in counters),
        )
