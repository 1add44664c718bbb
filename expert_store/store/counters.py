"""What the store counts."""

from __future__ import annotations

from dataclasses import dataclass

from expert_store.store.fill import Fill, Priority
from proto.stats import counter, gauge

_READS, _READ = "flashmoe_store_reads", "Records read"
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
    read_s: float = counter(
        "flashmoe_store_read_seconds", "Device and verification time", start=0.0
    )
    busy_s: float = counter(
        "flashmoe_store_busy_seconds", "Time with at least one read at the device", start=0.0
    )

    def count_read(self, fill: Fill) -> None:
        """One record that is whole now."""
        match fill.priority:
            case Priority.DEMAND:
                self.demand_reads += 1
            case Priority.PREFETCH:
                self.prefetch_reads += 1
            case Priority.REFILL:
                self.refill_reads += 1
        self.bytes_read += fill.record.payload_bytes
        self.read_s += (fill.arrived_ns - fill.start_ns) / 1e9


@dataclass(frozen=True)
class SlotCounts:
    """Slots by state, as they are now."""

    free: int = gauge(_SLOTS, _BY_STATE, key="slots_free", state="free")
    filling: int = gauge(_SLOTS, _BY_STATE, key="slots_filling", state="filling")
    leased: int = gauge(_SLOTS, _BY_STATE, key="slots_leased", state="leased")
    reclaimable: int = gauge(_SLOTS, _BY_STATE, key="slots_reclaimable", state="reclaimable")
