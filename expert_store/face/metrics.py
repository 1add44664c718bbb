"""The store's counters for Prometheus, read when scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from expert_store.store.store import ExpertStore


class StoreCollector(Collector):
    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        store, counters = self._store, self._store.counters
        reads = CounterMetricFamily("flashmoe_store_reads", "Records read", labels=["reason"])
        reads.add_metric(["demand"], counters.demand_reads)
        reads.add_metric(["prefetch"], counters.prefetch_reads)
        reads.add_metric(["refill"], counters.refill_reads)
        yield reads
        yield CounterMetricFamily(
            "flashmoe_store_read_bytes", "Payload bytes read", value=counters.bytes_read
        )
        yield CounterMetricFamily(
            "flashmoe_store_read_seconds", "Device and verification time", value=counters.read_s
        )
        yield CounterMetricFamily(
            "flashmoe_store_shared_hits",
            "Acquires answered from memory",
            value=counters.shared_hits,
        )
        yield CounterMetricFamily(
            "flashmoe_store_prefetches_dropped",
            "Prefetches dropped for want of room",
            value=counters.prefetches_dropped,
        )
        yield CounterMetricFamily(
            "flashmoe_store_busy_seconds",
            "Time with at least one read at the device",
            value=counters.busy_s,
        )
        yield CounterMetricFamily(
            "flashmoe_store_prefetches_withdrawn",
            "Prefetches that the router disproved before they were read",
            value=counters.prefetches_withdrawn,
        )
        yield CounterMetricFamily(
            "flashmoe_store_prefetches_used",
            "Prefetched experts that were asked for",
            value=counters.prefetches_used,
        )
        yield CounterMetricFamily(
            "flashmoe_store_prefetch_wasted_bytes",
            "Read for prefetches that nobody asked for",
            value=counters.prefetch_bytes_wasted,
        )
        slots = GaugeMetricFamily("flashmoe_store_slots", "Slots by state", labels=["state"])
        for state, count in store.slots.counts().items():
            slots.add_metric([state], count)
        yield slots
        sessions = GaugeMetricFamily("flashmoe_store_sessions", "Sessions", labels=["state"])
        sessions.add_metric(["open"], store.sessions.num_open)
        sessions.add_metric(["orphaned"], store.sessions.num_orphaned)
        yield sessions
        yield GaugeMetricFamily(
            "flashmoe_store_quarantined_experts", "Damaged experts", value=len(store.quarantined)
        )
        yield GaugeMetricFamily(
            "flashmoe_store_direct_io", "1: reads bypass the page cache", value=store.direct_io
        )
