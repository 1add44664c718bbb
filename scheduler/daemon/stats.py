"""What the scheduler counts and measures, as one value and as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.shadow.shadows import Report

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class SchedulerStats:
    """Counts since start only grow (restored ones go on); the rest is as it is now.

    events_rejected:  not to be decoded, or another model's
    events_lost:      trimmed from the stream between delivery and handling
    steps_missed:     decode steps of a sequence that never arrived
    lessons_skipped:  events that only moved the state, because there were too many
    shadow_steps_skipped: decode steps that no shadow followed, for the same reason
    shadow_restarts:  a node's budget changed, and its shadows began anew
    evidence_lag_s:   from the node's writing to our publication, by the wall clock
    learning_obstacle: why nothing is learned or advised now; empty when all is well
    nodes:            what the shadows of each node say
    """

    events_seen: int
    events_rejected: int
    events_lost: int
    events_claimed: int
    steps_missed: int
    lessons_skipped: int
    shadow_steps_skipped: int
    shadow_restarts: int
    nodes_dropped: int
    labels_learned: int
    drifts: int
    advice_published: int
    advice_failed: int
    read_failures: int
    groups_created: int
    snapshots: int
    snapshots_failed: int
    snapshots_damaged: int
    log_loss: float
    baseline_log_loss: float
    redis_connected: bool
    learning_obstacle: str
    advice_version: int
    advice_age_s: float | None
    evidence_lag_s: float | None
    step_ms: float
    cpu_share: float
    nodes: tuple[Report, ...]


GAUGES = {
    "log_loss": "progressive validation, decayed",
    "baseline_log_loss": "of always predicting the mean, decayed",
    "redis_connected": "1 while evidence can be read",
    "advice_version": "version of the last advice",
    "advice_age_s": "since the last advice",
    "evidence_lag_s": "from a node's writing to our publication",
    "step_ms": "one event from decode to publication, decayed mean",
    "cpu_share": "of one core, since start",
}
_NO_NUMBERS = ("nodes", "learning_obstacle")
COUNTERS = [f.name for f in fields(SchedulerStats) if f.name not in (*GAUGES, *_NO_NUMBERS)]
SHADOW_GAUGES = {
    "hit_ratio": "what the policy would have hit under the node's budget, since that changed",
    "windowed_hit_ratio": "the same, decayed",
    "windowed_regret": "what MIN would have hit more, decayed",
}


class StatsCollector(Collector):
    """Reads the stats when a scrape asks for them."""

    def __init__(self, stats: Callable[[], SchedulerStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name in COUNTERS:
            metric = f"flashmoe_scheduler_{name}"
            yield CounterMetricFamily(metric, name.replace("_", " "), value=getattr(stats, name))
        for name, meaning in GAUGES.items():
            value = getattr(stats, name)
            if value is not None:
                yield GaugeMetricFamily(f"flashmoe_scheduler_{name}", meaning, value=float(value))
        yield GaugeMetricFamily(
            "flashmoe_scheduler_learning",
            "1 while evidence comes and advice leaves",
            value=not stats.learning_obstacle,
        )
        yield from _shadows(stats.nodes)


def _shadows(nodes: Sequence[Report]) -> Iterator[Metric]:
    """By node and policy; `actual` is the node's own cache, `min` the optimum."""
    for name, meaning in SHADOW_GAUGES.items():
        metric = f"flashmoe_scheduler_shadow_{name}"
        family = GaugeMetricFamily(metric, meaning, labels=("node", "policy"))
        for node in nodes:
            for policy, score in {**node.policies, "actual": node.actual}.items():
                family.add_metric((node.node, policy), getattr(score, name))
        yield family
    in_charge = GaugeMetricFamily(
        "flashmoe_scheduler_in_charge", "1 for the policy in charge", labels=("node", "policy")
    )
    switches = CounterMetricFamily(
        "flashmoe_scheduler_switches", "changes of the policy in charge", labels=("node",)
    )
    for node in nodes:
        in_charge.add_metric((node.node, node.in_charge), 1)
        switches.add_metric((node.node,), node.switches)
    yield in_charge
    yield switches
