"""A snapshot as Prometheus families, taken when a page is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from proto import stats
from proto import stats_pb2 as pb

_FAMILIES = {pb.Metric.COUNTER: CounterMetricFamily, pb.Metric.GAUGE: GaugeMetricFamily}


class SnapshotCollector(Collector):
    def __init__(self, snapshot: Callable[[], pb.Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        """Every family that has a value now; facts have none."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for metric in self._snapshot().metrics:
            value, labels = stats.value_of(metric), sorted(metric.labels)
            if metric.kind == pb.Metric.FACT or value is None:
                continue
            assert isinstance(value, int | float), f"{metric.key} is no number"
            if metric.page_name not in families:
                family = _FAMILIES[metric.kind](metric.page_name, metric.help, labels=labels)
                families[metric.page_name] = family
            families[metric.page_name].add_metric([metric.labels[name] for name in labels], value)
        return families.values()
