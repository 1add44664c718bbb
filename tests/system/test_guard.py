"""A card that promises too much, on real processes: its setting is noticed and undone, and exact
requests beside it keep every token.

Planted faults seen red: a guard that hears nothing, one that goes on with the rung that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from tests.compute_node.face.test_quality import node_with, setting

pytestmark = pytest.mark.system
QUALITY = "0.5%"
PLANTED = "prior .6"  # costs thrice the budget
PROMPTS = ["In the beginning", "The kernel", "Grüße und", "A list of"]


@pytest.fixture
def client(tiny_store: Path) -> Iterator[NodeClient]:
    with node_with(tiny_store, settings=(setting(PLANTED, 0.0001, 20.0),)) as started:
        yield started


@pytest.mark.timeout(600)
def test_a_planted_setting_is_undone_within_a_thousand_tokens(client: NodeClient) -> None:
    exact = [client.generate(prompt, max_tokens=24).run().token_ids for prompt in PROMPTS]
    num_lossy, beside, routes = 0, list[list[int]](), dict[str, int]()
    for number in range(1000):
        prompt = PROMPTS[number % len(PROMPTS)]
        lossy = client.generate(
            prompt,
            max_tokens=64,
            temperature=1.0,
            seed=number,
            ignore_eos=True,
            quality=QUALITY,
        ).run()
        routes = lossy.routes
        num_lossy += routes.get(PLANTED, 0)
        if len(beside) < len(PROMPTS):
            beside.append(client.generate(prompt, max_tokens=24).run().token_ids)
        if "" in routes or num_lossy > 1000:
            break
    assert num_lossy <= 1000 and "" in routes, "undone"
    assert beside == exact[: len(beside)]
    after = client.generate(PROMPTS[0], max_tokens=24, quality=QUALITY).run()
    assert (after.token_ids, set(after.routes)) == (exact[0], {""})
    guard = client.stats().by("budget")[QUALITY]
    assert (guard.quality_route, guard.quality_rung, guard.quality_tightened) == ("exact", 0, 1)
