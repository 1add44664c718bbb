"""A metrics page: who hears it, and what it leaves out.

Planted faults seen red: it binds 0.0.0.0, the socket outlives the block, no age is given as age
zero, a count is given as a gauge, labels are mixed up, buckets are not added up, a value on a bound
falls above it.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto import errors, stats
from proto import stats_pb2 as pb
from proto.histogram import Histogram
from proto.process.daemon import serving_metrics
from proto.stats import histogram, labelled
from tests.proto.test_stats import Lake, Pond


@dataclass
class Rain:
    """Values on a bound, between two, and beyond the last."""

    drops_s: Histogram = histogram("flashmoe_rain_seconds", "Of drops", (0.5, 2.0), wind="no")

    def __post_init__(self) -> None:
        for value in (0.5, 0.75, 1.0, 8.0):
            self.drops_s.observe(value)


def shown() -> pb.Snapshot:
    ponds = (labelled(Pond(number, name="x"), layer=number) for number in (3, 1))
    return stats.snapshot(*ponds, Lake(), Rain())


def scrape(port: int | None) -> dict[tuple[str, str], list[tuple[str, dict[str, str], float]]]:
    """Samples by family and type, those of the process apart."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        families: Any = text_string_to_metric_families(reply.read().decode())
    return {
        (family.name, family.type): [tuple(sample[:3]) for sample in family.samples]
        for family in families
        if family.name.startswith("flashmoe_")
    }


def test_a_scrape_has_every_number_there_is(tmp_path: Path) -> None:
    """Facts and what is not known now are left out."""
    port_file = tmp_path / "port"
    with serving_metrics(shown, 0, port_file) as port:
        samples = scrape(port)
        assert port_file.read_text() == f"{port}\n"
    frogs, depth = "flashmoe_pond_frogs", "flashmoe_pond_depth_m"
    assert samples == {
        (frogs, "counter"): [
            (f"{frogs}_total", {"layer": "3", "colour": "green"}, 3.0),
            (f"{frogs}_total", {"layer": "1", "colour": "green"}, 1.0),
        ],
        (depth, "gauge"): [(depth, {"layer": "3"}, 0.0), (depth, {"layer": "1"}, 0.0)],
        ("flashmoe_lake_boats", "counter"): [("flashmoe_lake_boats_total", {}, 0.0)],
        ("flashmoe_lake_is_frozen", "gauge"): [("flashmoe_lake_is_frozen", {}, 1.0)],
        ("flashmoe_rain_seconds", "histogram"): [
            ("flashmoe_rain_seconds_bucket", {"wind": "no", "le": "0.5"}, 1.0),
            ("flashmoe_rain_seconds_bucket", {"wind": "no", "le": "2"}, 3.0),
            ("flashmoe_rain_seconds_bucket", {"wind": "no", "le": "+Inf"}, 4.0),
            ("flashmoe_rain_seconds_count", {"wind": "no"}, 4.0),
            ("flashmoe_rain_seconds_sum", {"wind": "no"}, 10.25),
        ],
    }


def test_only_loopback_hears_it_and_the_port_is_given_back() -> None:
    with serving_metrics(shown, 0, None) as port:
        assert port is not None
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
        with (
            pytest.raises(errors.ConfigInvalid, match=f"metrics_port {port}"),
            serving_metrics(shown, port, None),
        ):
            pass
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_off_by_default() -> None:
    with serving_metrics(shown, None, None) as port:
        assert port is None
