"""What the store counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from proto.stats import counter, gauge

_READS, _READ = "flashmoe_store_reads", "Records read"
_SLOTS, _BY_STATE = "flashmoe_store_slots", "Slots by state"


@dataclass
class Counters:
    """Since start."""

    demand_reads: Annotated[int, counter(_READS, _READ, reason="demand")] = 0
    prefetch_reads: Annotated[int, counter(_READS, _READ, reason="prefetch")] = 0
    refill_reads: Annotated[int, counter(_READS, _READ, reason="refill")] = 0
    bytes_read: Annotated[int, counter("flashmoe_store_read_bytes", "Payload bytes read")] = 0
    shared_hits: Annotated[
        int, counter("flashmoe_store_shared_hits", "Acquires answered from memory")
    ] = 0
    prefetches_dropped: Annotated[
        int, counter("flashmoe_store_prefetches_dropped", "Prefetches dropped for want of room")
    ] = 0
    prefetches_withdrawn: Annotated[
        int,
        counter(
            "flashmoe_store_prefetches_withdrawn",
            "Prefetches that the router disproved before they were read",
        ),
    ] = 0
    prefetches_used: Annotated[
        int, counter("flashmoe_store_prefetches_used", "Prefetched experts that were asked for")
    ] = 0
    prefetch_bytes_wasted: Annotated[
        int,
        counter(
            "flashmoe_store_prefetch_wasted_bytes", "Read for prefetches that nobody asked for"
        ),
    ] = 0
    read_s: Annotated[
        float, counter("flashmoe_store_read_seconds", "Device and verification time")
    ] = 0.0
    busy_s: Annotated[
        float, counter("flashmoe_store_busy_seconds", "Time with at least one read at the device")
    ] = 0.0


@dataclass(frozen=True)
class SlotCounts:
    """Slots by state, as they are now."""

    free: Annotated[int, gauge(_SLOTS, _BY_STATE, key="slots_free", state="free")]
    filling: Annotated[int, gauge(_SLOTS, _BY_STATE, key="slots_filling", state="filling")]
    leased: Annotated[int, gauge(_SLOTS, _BY_STATE, key="slots_leased", state="leased")]
    reclaimable: Annotated[
        int, gauge(_SLOTS, _BY_STATE, key="slots_reclaimable", state="reclaimable")
    ]
