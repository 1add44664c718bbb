from __future__ import annotations

import socket
from dataclasses import fields, replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto import errors
from proto.process.daemon import serving_metrics
from scheduler.daemon.stats import SchedulerStats, StatsCollector
from scheduler.policy.hedged import Reason
from scheduler.shadow.shadows import Report, Score

REPORT = Report(
    node="node-a",
    slots=96,
    scope="pool",
    steps=1200,
    in_charge="lfru",
    reason=Reason("led", "decayed", 0.021, 87, 1113),
    switches=3,
    policies={"lfru": Score(0.81, 0.82, 0.08), "min": Score(0.88, 0.9, 0.0)},
    actual=Score(0.79, 0.8, 0.1),
)
STATS = SchedulerStats(
    nodes=(REPORT,),
    **{
        field.name: {"bool": True, "str": f"why {number}"}.get(str(field.type), number + 1)
        for number, field in enumerate(fields(SchedulerStats))
        if field.name != "nodes"
    },
)


def scrape(port: int | None) -> dict[str, float]:
    """By name, then labels if any."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    families = text_string_to_metric_families(text)
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_scrape_tells_every_stat(tmp_path: Path) -> None:
    """Red when a stat is forgotten, or a count is given as a gauge."""
    port_file = tmp_path / "port"
    with serving_metrics(StatsCollector(lambda: STATS), 0, port_file) as port:
        samples = scrape(port)
        assert port_file.read_text() == f"{port}\n"
    ours = [n for n in samples if n.startswith("flashmoe_scheduler_") and "node-a" not in n]
    assert len(ours) == len(fields(SchedulerStats)) - 1
    assert samples["flashmoe_scheduler_events_seen_total"] == STATS.events_seen
    assert samples["flashmoe_scheduler_advice_age_s"] == STATS.advice_age_s
    assert samples["flashmoe_scheduler_redis_connected"] == 1


def test_a_scrape_tells_what_the_shadows_say() -> None:
    """Red when a policy, MIN or the node's own cache is left out, or one's figure is another's."""
    with serving_metrics(StatsCollector(lambda: STATS), 0, None) as port:
        samples = scrape(port)
    told = {name: value for name, value in samples.items() if "node-a" in name}
    shadow = "flashmoe_scheduler_shadow"
    assert told == {
        f"{shadow}_hit_ratio node-a lfru": 0.81,
        f"{shadow}_hit_ratio node-a min": 0.88,
        f"{shadow}_hit_ratio node-a actual": 0.79,
        f"{shadow}_windowed_hit_ratio node-a lfru": 0.82,
        f"{shadow}_windowed_hit_ratio node-a min": 0.9,
        f"{shadow}_windowed_hit_ratio node-a actual": 0.8,
        f"{shadow}_windowed_regret node-a lfru": 0.08,
        f"{shadow}_windowed_regret node-a min": 0.0,
        f"{shadow}_windowed_regret node-a actual": 0.1,
        "flashmoe_scheduler_in_charge node-a lfru": 1,
        "flashmoe_scheduler_switches_total node-a": 3,
    }


def test_what_is_not_known_yet_is_not_told() -> None:
    """Red when no age is given as age zero."""
    with serving_metrics(
        StatsCollector(lambda: replace(STATS, advice_age_s=None)), 0, None
    ) as port:
        assert "flashmoe_scheduler_advice_age_s" not in scrape(port)


def test_only_loopback_hears_it_and_the_port_is_given_back() -> None:
    """Red when it binds 0.0.0.0, or the socket outlives the block."""
    with serving_metrics(StatsCollector(lambda: STATS), 0, None) as port:
        assert port is not None
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
        with (
            pytest.raises(errors.ConfigInvalid, match=f"metrics_port {port}"),
            serving_metrics(StatsCollector(lambda: STATS), port, None),
        ):
            pass
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_off_by_default() -> None:
    with serving_metrics(StatsCollector(lambda: STATS), None, None) as port:
        assert port is None
