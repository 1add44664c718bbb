"""Requests within a quality budget on a real node: what is refused, what a reply and the counters
say of it, and that exact requests beside it keep their tokens.

Planted faults seen red: a guard for each request, a default that overrules a route, exact requests
by the guard's rung.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from proto import errors
from proto.quality import QualityCard, Setting
from tests.daemons import daemon, node_table, store_table

pytestmark = pytest.mark.system
OTHER = list(range(900, 940))  # not all of its experts are in memory
SAY: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}


def setting(route: str, kl: float, tokens_per_s: float) -> Setting:
    cost = 1 + kl
    return Setting(
        route=route,
        perplexity=cost,
        perplexity_low=cost,
        perplexity_high=cost,
        worst_text=cost,
        kl=kl,
        top1=1.0,
        bytes_ratio=1.0,
        bytes_per_token=1.0,
        tokens_per_s=tokens_per_s,
        token_ms_p50=1.0,
        token_ms_p95=1.0,
    )


def card_of(store_dir: Path, path: Path, *settings: Setting) -> Path:
    fingerprint = Manifest.load(store_dir).spec.fingerprint
    given = (setting("", 0.0, 10.0), *settings)
    QualityCard(
        fingerprint=fingerprint,
        experts_bytes=1,
        texts="none",
        num_texts=1,
        num_tokens=1,
        settings=given,
    ).write(path)
    return path


@contextmanager
def node_with(store_dir: Path, slots: int = 96, **more: Any) -> Iterator[NodeClient]:
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        run = Path(folder)
        if settings := more.pop("settings", ()):
            more["quality_path"] = str(card_of(store_dir, run / "quality.json", *settings))
        with (
            daemon("expert_store", run, store_table(store_dir, run, slots + 4)),
            daemon("compute_node", run, node_table(run, "n", slots, **more), "n") as started,
            NodeClient(started.address) as client,
        ):
            yield client


RUNGS = (setting("prior .05", 0.0005, 20.0), setting("prior .1 + skip .5", 0.003, 30.0))


def test_a_budget_is_kept_and_told(tiny_store: Path) -> None:
    with node_with(tiny_store, settings=RUNGS) as client:
        exact = client.generate("In the beginning", quality="exact", **SAY).run()
        lossy = client.generate(OTHER, quality="1%", **SAY).run()
        tight = client.generate(OTHER, quality="0.1%", **SAY).run()
        again = client.generate("In the beginning", **SAY).run()
        scored = list(client.score(OTHER, quality="1%"))
        stats = client.stats()
    assert exact.token_ids == again.token_ids
    assert (exact.quality, exact.routes, exact.estimate) == ("exact", {"": 59}, None)
    assert lossy.quality == "1%" and lossy.routes == {"prior .1 + skip .5": 59}
    assert lossy.decode.substituted + lossy.decode.skipped > 0
    assert lossy.decode.checks == 14 and lossy.decode.check_bytes > 0 < lossy.decode.check_s
    assert lossy.estimate is not None and lossy.estimate.checks == 14
    assert lossy.estimate.kl_low <= lossy.estimate.kl <= lossy.estimate.kl_high
    assert lossy.estimate.top1_low <= lossy.estimate.top1 <= lossy.estimate.top1_high
    assert set(tight.routes) <= {"prior .05", ""} and tight.routes["prior .05"] >= 4, "tightened"
    checked = [token for token in scored if token.kl is not None]
    assert len(scored) == len(OTHER) - 1 and checked, "the guard says what is checked of a text"
    guard = stats.by("budget")["1%"]
    assert guard.quality_checks == 14 + len(checked)
    assert guard.quality_route == "prior .1 + skip .5" and guard.quality_kl is not None
    assert stats.lossy_tokens == 59 + tight.routes["prior .05"] + len(scored)
    assert stats.lossy_substituted + stats.lossy_skipped > 0 and stats.exact_pass == "on"


def test_the_nodes_budget_is_of_requests_that_name_nothing(tiny_store: Path) -> None:
    with node_with(tiny_store, settings=RUNGS, quality="1%") as client:
        assert client.generate(OTHER, **SAY).run().routes == {"prior .1 + skip .5": 59}
        assert client.generate(OTHER, quality="exact", **SAY).run().routes == {"": 59}
        named = client.generate(OTHER, route="prior .2", **SAY).run()
        assert (named.quality, named.routes, named.decode.checks) == ("", {"prior .2": 59}, 0)
        exact = client.generate(OTHER, route="exact", **SAY).run()
        assert exact.quality == "exact" and not exact.decode.substituted


def test_what_cannot_be_kept_is_refused(tiny_store: Path) -> None:
    with node_with(tiny_store) as client:
        with pytest.raises(errors.InvalidRequest, match="flashmoe tune"):
            client.generate(OTHER, quality="1%").run()
        with pytest.raises(errors.InvalidRequest, match="not both"):
            client.generate(OTHER, quality="1%", route="prior .1").run()
        with pytest.raises(errors.InvalidRequest, match="is no budget"):
            client.generate(OTHER, quality="good").run()
        with pytest.raises(errors.InvalidRequest, match="flashmoe tune"):
            list(client.score(OTHER, quality="1%"))
        assert client.generate(OTHER, quality="exact", **SAY).run().quality == "exact"


def test_a_route_that_the_store_cannot_serve_is_refused(tiny_store: Path) -> None:
    settings = (setting("precision .9", 0.0005, 20.0),)
    with node_with(tiny_store, settings=settings) as client:
        with pytest.raises(errors.InvalidRequest, match="variants"):
            client.generate(OTHER, quality="1%").run()
        assert client.stats().requests == 0


def test_too_many_budgets_are_refused(tiny_store: Path) -> None:
    with node_with(tiny_store, settings=RUNGS) as client:
        for number in range(1, 33):
            client.generate("In", max_tokens=1, quality=f"{number}%").run()
        with pytest.raises(errors.InvalidRequest, match="one budget more than the 32"):
            client.generate("In", max_tokens=1, quality="0.5%").run()
        client.generate("In", max_tokens=1, quality="32%").run()
