"""Shadows on a node's stream, against what a replay of the same events counts.

Planted faults seen red: no lag for scores; the remainder of the slots given to the last layers; one
share for all layers; layers instead of a pool; regret against the hit ratio of all steps; a shadow
told as the node's own; a window that never forgets; scores of a local policy; slots as told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from proto import errors
from proto.access import DecodeAccess
from scheduler.policy.decayed import Decayed
from scheduler.policy.lfru import Lfru
from scheduler.policy.lru import Lru
from scheduler.shadow.shadows import Capacity, Shadows, Tally
from scheduler.simulate.ranking import RankingPolicy
from scheduler.simulate.replay import Setting, ranked, replay
from scheduler.simulate.slots import LayerSlots
from tests.scheduler.replays import misses, recorded
from tests.scheduler.traces import decode_step

TRACE = recorded()
HALF_LIFE_STEPS = 64.0


def events(slots: int, scope: str = "layer") -> Iterator[DecodeAccess]:
    """The recorded run as a node would tell it. slots: of all layers together."""
    random = np.random.default_rng(0)
    for event in TRACE.events():
        hits = random.random(event.topk_ids.shape) < 0.5
        yield replace(event, slots=slots, scope=scope, hits=hits)


def members() -> dict[str, RankingPolicy]:
    shape = TRACE.shape
    return {"decayed": Decayed(shape), "lru": Lru(shape), "lfru": Lfru(shape), "river": Lfru(shape)}


def followed(
    stream: Iterator[DecodeAccess], policies: Mapping[str, RankingPolicy], pinned: str | None = None
) -> Shadows:
    first = next(stream)
    capacity = Capacity.of(first)
    shadows = Shadows(capacity, policies, frozenset({"river"}), HALF_LIFE_STEPS, pinned)
    for event in (first, *stream):
        shadows.step(event)
    return shadows


@pytest.mark.parametrize("scope", ["layer", "pool"])
@pytest.mark.parametrize("slots", [6, 12])
def test_counts_what_a_replay_counts(slots: int, scope: str) -> None:
    """Every local policy, MIN, and one whose ranks are a step late."""
    shadows = followed(events(slots * TRACE.num_layers, scope), members())
    report = shadows.report("node-a")
    for name in ("decayed", "lru", "lfru", "min"):
        expected = 1 - misses(name, TRACE, slots, scope) / TRACE.topk_ids.size
        assert report.policies[name].hit_ratio == pytest.approx(expected), name
    late = Setting(TRACE, slots, scope, warmup_steps=0, lag_steps=1)
    one_step_late = replay(late, ranked(late, Lfru(TRACE.shape), advised=True)).hit_ratio
    assert report.policies["river"].hit_ratio == pytest.approx(one_step_late)
    assert one_step_late != pytest.approx(report.policies["lfru"].hit_ratio)


def test_layers_share_the_remainder_as_the_node_does() -> None:
    capacity = Capacity((4, 8), 2, 18, "layer")
    assert capacity.shares().tolist() == [5, 5, 4, 4]
    assert Capacity((4, 8), 2, 18, "pool").shares().tolist() == [18]


def test_layers_keep_to_shares_of_their_own() -> None:
    slots = LayerSlots((2, 8), np.array([3, 2]))
    ranks = np.tile(np.arange(8.0), (2, 1))
    for ids in ([[0, 1], [0, 1]], [[2, 3], [2, 3]]):
        slots.step(np.array(ids, np.uint16), ranks, ranks)
    again = slots.step(np.array([[1, 3], [1, 3]], np.uint16), ranks, ranks)
    assert again.tolist() == [[True, True], [False, True]]


def test_regret_is_what_min_hit_more_of_late() -> None:
    report = followed(events(12 * TRACE.num_layers), members()).report("node-a")
    best = report.policies["min"]
    assert best.windowed_regret == 0
    for score in (*report.policies.values(), report.actual):
        assert score.windowed_regret == best.windowed_hit_ratio - score.windowed_hit_ratio
    assert report.policies["lru"].windowed_regret > 0


def test_the_nodes_own_hits_are_told_beside() -> None:
    report = followed(events(96), members()).report("node-a")
    told = np.mean([event.hits.mean() for event in events(96)])
    assert report.actual.hit_ratio == pytest.approx(told)


def test_a_window_forgets() -> None:
    tally = Tally(half_life_steps=10)
    for _ in range(1000):
        tally.count(0.0)
    for _ in range(10):
        tally.count(1.0)
    assert tally.windowed_hit_ratio == pytest.approx(0.5)
    assert tally.hit_ratio == pytest.approx(10 / 1010)


def test_scores_are_those_of_the_policy_in_charge() -> None:
    """None for one of the node's own, which ranks by its own books."""
    policies = members()
    pinned = followed(events(96), policies, pinned="river")
    scores = pinned.scores()
    assert scores is not None
    np.testing.assert_array_equal(scores, policies["river"].ranks().astype(np.float32))
    assert (pinned.in_charge, pinned.report("n").reason.kind) == ("river", "pinned")
    free = followed(events(96), members())
    assert free.in_charge in ("decayed", "lru", "lfru")
    assert free.scores() is None


@pytest.mark.parametrize(("slots", "scope"), [(3, "layer"), (0, "layer"), (1, "pool")])
def test_a_budget_that_holds_no_token_is_refused(slots: int, scope: str) -> None:
    with pytest.raises(errors.MessageInvalid, match=f"evidence of {slots} slots"):
        Capacity.of(decode_step([[0, 1], [2, 3]], slots=slots, scope=scope))


def test_slots_beyond_the_model_are_no_memory() -> None:
    """Red when a count from the wire is taken as it comes."""
    assert Capacity.of(decode_step([[0, 1], [2, 3]], slots=1 << 62)).slots == 16
