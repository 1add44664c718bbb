"""The node's counters for Prometheus, read when scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from compute_node.engine.engine import Engine
from compute_node.engine.jobs import ComputeThread
from compute_node.evidence import learning
from compute_node.evidence.advice import AdviceFeed
from compute_node.evidence.log import AccessLog


class NodeCollector(Collector):
    def __init__(
        self,
        engine: Engine,
        compute: ComputeThread,
        access_log: AccessLog | None,
        advice: AdviceFeed | None,
    ) -> None:
        self._engine = engine
        self._compute = compute
        self._access_log = access_log
        self._advice = advice

    def collect(self) -> Iterator[Metric]:
        cache, prober = self._engine.cache, self._engine.loaded.prober
        accesses = CounterMetricFamily(
            "flashmoe_node_accesses", "Routed experts by outcome", labels=["layer", "outcome"]
        )
        read = CounterMetricFamily(
            "flashmoe_node_read_bytes", "Bytes its misses read from disk", labels=["layer"]
        )
        stall = CounterMetricFamily(
            "flashmoe_node_stall_seconds", "Compute waited for experts", labels=["layer"]
        )
        for layer, counters in cache.counters.items():
            accesses.add_metric([str(layer), "hit"], counters.hits)
            accesses.add_metric([str(layer), "miss"], counters.misses)
            read.add_metric([str(layer)], counters.bytes_read)
            stall.add_metric([str(layer)], counters.stall_s)
        yield from (accesses, read, stall)
        yield GaugeMetricFamily(
            "flashmoe_node_resident_experts", "Experts in the cache", value=len(cache)
        )
        yield GaugeMetricFamily(
            "flashmoe_node_queued_requests", "Waiting", value=self._compute.num_queued
        )
        yield from self._prefetches()
        yield _chosen(
            "flashmoe_node_matrix_shapes",
            "Shapes of matrices by what multiplies one token with them",
            prober.gemv.count(native=True),
            prober.gemv.count(native=False),
        )
        yield _chosen(
            "flashmoe_node_norms",
            "Norms by what computes one token's",
            prober.num_modules["norm", True],
            prober.num_modules["norm", False],
        )
        yield _chosen(
            "flashmoe_node_experts_modules",
            "Experts modules by what computes one token's gate",
            prober.num_modules["gate", True],
            prober.num_modules["gate", False],
        )
        evictions = CounterMetricFamily(
            "flashmoe_node_evictions_decided", "By whom evictions were decided", labels=["by"]
        )
        evictions.add_metric(["advice"], cache.chooser.num_advised)
        evictions.add_metric(["fallback"], cache.chooser.num_fallbacks)
        yield evictions
        yield GaugeMetricFamily(
            "flashmoe_node_learning",
            "1 while evidence leaves and advice comes",
            value=not learning.obstacle(self._access_log, self._advice),
        )
        if self._access_log:
            evidence = CounterMetricFamily(
                "flashmoe_node_evidence", "Evidence entries", labels=["outcome"]
            )
            evidence.add_metric(["sent"], self._access_log.num_sent)
            evidence.add_metric(["dropped"], self._access_log.num_dropped)
            yield evidence
        if self._advice and self._advice.age_s is not None:
            yield GaugeMetricFamily(
                "flashmoe_node_advice_age_seconds", "Age of advice", value=self._advice.age_s
            )

    def _prefetches(self) -> Iterator[Metric]:
        prefetcher = self._engine.loaded.prefetcher
        guesses = CounterMetricFamily(
            "flashmoe_node_prefetches",
            "Guesses of experts that were not resident",
            labels=["layers_ahead", "outcome"],
        )
        precision = GaugeMetricFamily(
            "flashmoe_node_prefetch_precision",
            "Share of guesses that the router chose",
            labels=["layers_ahead"],
        )
        for number, distance in enumerate(prefetcher.distances, start=1):
            guesses.add_metric([str(number), "sent"], distance.sent)
            guesses.add_metric([str(number), "right"], distance.right)
            precision.add_metric([str(number)], distance.precision)
        yield from (guesses, precision)
        yield CounterMetricFamily(
            "flashmoe_node_unguessed_misses",
            "Misses of decode steps that nobody had guessed",
            value=prefetcher.num_unguessed,
        )
        yield GaugeMetricFamily(
            "flashmoe_node_prefetch_depth", "Layers ahead that pay now", value=prefetcher.depth
        )


def _chosen(name: str, text: str, native: int, torch: int) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=["kernel"])
    gauge.add_metric(["native"], native)
    gauge.add_metric(["torch"], torch)
    return gauge
