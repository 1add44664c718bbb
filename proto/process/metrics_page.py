"""A snapshot as Prometheus families, taken when a page is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from proto import stats
from proto import stats_pb2 as pb
from proto.histogram import Histogram

_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_FAMILIES: dict[pb.Metric.Kind.ValueType, type[_Family]] = {
    pb.Metric.COUNTER: CounterMetricFamily,
    pb.Metric.GAUGE: GaugeMetricFamily,
    pb.Metric.HISTOGRAM: HistogramMetricFamily,
}


class SnapshotCollector(Collector):
    def __init__(self, snapshot: Callable[[], pb.Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        return families_of(self._snapshot())


def page_of(snapshot: pb.Snapshot) -> bytes:
    """As Prometheus scrapes it."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: snapshot))
    return generate_latest(registry)


def families_of(snapshot: pb.Snapshot) -> Iterable[Metric]:
    """Every family that has a value now; facts have none."""
    families: dict[str, _Family] = {}
    for metric in snapshot.metrics:
        value = stats.value_of(metric)
        if metric.kind not in _FAMILIES or value is None:
            continue
        if metric.page_name not in families:
            family = _FAMILIES[metric.kind](
                metric.page_name, metric.help, labels=sorted(metric.labels)
            )
            families[metric.page_name] = family
        _add(families[metric.page_name], metric, value)
    return families.values()


def _add(family: _Family, metric: pb.Metric, value: stats.Value) -> None:
    labels = [metric.labels[name] for name in sorted(metric.labels)]
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(value, Histogram), f"{metric.key} is no histogram"
        family.add_metric(labels, [*value.cumulative()], value.total)
    else:
        assert isinstance(value, int | float), f"{metric.key} is no number"
        family.add_metric(labels, value)
