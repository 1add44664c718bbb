from __future__ import annotations

import socket
from dataclasses import fields, replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto import errors
from proto.daemon import serving_metrics
from scheduler.stats import SchedulerStats, StatsCollector

STATS = SchedulerStats(
    **{
        field.name: True if field.type == "bool" else number + 1
        for number, field in enumerate(fields(SchedulerStats))
    }
)


def scrape(port: int | None) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_scrape_tells_every_stat(tmp_path: Path) -> None:
    """Red when a stat is forgotten, or a count is given as a gauge."""
    port_file = tmp_path / "port"
    with serving_metrics(StatsCollector(lambda: STATS), 0, port_file) as port:
        samples = scrape(port)
        assert port_file.read_text() == f"{port}\n"
    ours = [name for name in samples if name.startswith("flashmoe_scheduler_")]
    assert len(ours) == len(fields(SchedulerStats))
    assert samples["flashmoe_scheduler_events_seen_total"] == STATS.events_seen
    assert samples["flashmoe_scheduler_advice_age_s"] == STATS.advice_age_s
    assert samples["flashmoe_scheduler_redis_connected"] == 1


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
