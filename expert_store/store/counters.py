"""What the store counts."""

from __future__ import annotations

from dataclasses import dataclass

from expert_store.store.fill import Fill, Priority
from proto.histogram import Histogram
from proto.stats import counter, gauge, histogram

_READS, _READ = "flashmoe_store_reads", "Records read"
_LATENCY, _TOOK = "flashmoe_store_read_seconds", "Device and verification time of a record"
_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_SLOTS, _BY_STATE = "flashmoe_store_slots", "Slots by state"


@dataclass
class Counters:
    """Since start."""

    demand_reads: int = counter(_READS, _READ, reason="demand")
    prefetch_reads: int = counter(_READS, _READ, reason="prefetch")
    refill_reads: int = counter(_READS, _READ, reason="refill")
    bytes_read: int = counter("flashmoe_store_read_bytes", "Payload bytes read")
    shared_hits: int = counter("flashmoe_store_shared_hits", "Acquires answered from memory")
    prefetches_dropped: int = counter(
        "flashmoe_store_prefetches_dropped", "Prefetches dropped for want of room"
    )
    prefetches_withdrawn: int = counter(
        "flashmoe_store_prefetches_withdrawn",
        "Prefetches that the router disproved before they were read",
    )
    prefetches_used: int = counter(
        "flashmoe_store_prefetches_used", "Prefetched experts that were asked for"
    )
    prefetch_bytes_wasted: int = counter(
        "flashmoe_store_prefetch_wasted_bytes", "Read for prefetches that nobody asked for"
    )
    prefetch_bytes_read: int = counter(
        "flashmoe_store_prefetch_read_bytes", "Asked of the device before a session waited for them"
    )
    prefetch_bytes_used: int = counter(
        "flashmoe_store_prefetch_used_bytes", "Of those, of records that a session acquired"
    )
    demand_read_s: Histogram = histogram(_LATENCY, _TOOK, _BOUNDS_S, reason="demand")
    prefetch_read_s: Histogram = histogram(_LATENCY, _TOOK, _BOUNDS_S, reason="prefetch")
    refill_read_s: Histogram = histogram(_LATENCY, _TOOK, _BOUNDS_S, reason="refill")
    busy_s: float = counter(
        "flashmoe_store_busy_seconds", "Time with at least one read at the device", start=0.0
    )

    def count_read(self, fill: Fill) -> None:
        """One record that is whole now."""
        read_s = (fill.arrived_ns - fill.start_ns) / 1e9
        match fill.priority:
            case Priority.DEMAND:
                self.demand_reads += 1
                self.demand_read_s.observe(read_s)
            case Priority.PREFETCH:
                self.prefetch_reads += 1
                self.prefetch_read_s.observe(read_s)
            case Priority.REFILL:
                self.refill_reads += 1
                self.refill_read_s.observe(read_s)
        self.bytes_read += fill.record.payload_bytes


@dataclass(frozen=True)
class SlotCounts:
    """Slots by state, as they are now."""

    free: int = gauge(_SLOTS, _BY_STATE, key="slots_free", state="free")
    filling: int = gauge(_SLOTS, _BY_STATE, key="slots_filling", state="filling")
    leased: int = gauge(_SLOTS, _BY_STATE, key="slots_leased", state="leased")
    reclaimable: int = gauge(_SLOTS, _BY_STATE, key="slots_reclaimable", state="reclaimable")
