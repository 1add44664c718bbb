"""What the store counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Since start. busy_s: with at least one read at the device."""

    demand_reads: int = 0
    prefetch_reads: int = 0
    refill_reads: int = 0
    bytes_read: int = 0
    shared_hits: int = 0
    prefetches_dropped: int = 0
    prefetches_withdrawn: int = 0
    prefetches_used: int = 0
    prefetch_bytes_wasted: int = 0
    read_s: float = 0.0
    busy_s: float = 0.0
