"""Golden miss counts of every policy on a recorded trace, and what a replay counts.

A golden number that changes is a decision: it is edited by hand, with the reason in the commit.
Planted faults seen red: the warm-up counted, ranks of the present step when advice lags, the gap
turned round, no check of the scope.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from proto import errors
from proto.access import DecodeAccess
from scheduler.lab.policies import POLICIES, Background, hedged
from scheduler.policy.lfru import Lfru
from scheduler.simulate.ranking import Ranks
from scheduler.simulate.replay import (
    Outcome,
    RankedCache,
    Setting,
    as_document,
    gap_closed,
    ranked,
    replay,
)
from scheduler.simulate.slots import Hits, LayerSlots
from scheduler.simulate.trace import TraceInvalid
from tests.scheduler.replays import misses, recorded, scored, trace_of

# tests/traces/tiny-moe-decode.npz, all 360 steps: slots (6, 12, 16) per layer, then in a pool
GOLDEN_MISSES = {
    "lru": ((3893, 1355, 655), (3903, 1244, 568)),
    "lfu": ((4100, 1515, 808), (4705, 1711, 753)),
    "lfru": ((3676, 1241, 649), (3636, 1122, 560)),
    "decayed": ((3606, 1191, 584), (3395, 1093, 536)),
    "arc": ((3907, 1356, 654), (4267, 1224, 541)),
    "s3fifo": ((3748, 1216, 615), (3826, 1119, 533)),
    "lecar": ((3784, 1279, 639), (3661, 1125, 548)),
    "min": ((2976, 772, 382), (2101, 577, 314)),
}
# The same of tests/traces/tiny-moe-scored.npz, all 180 steps
GOLDEN_MISSES_BY_SCORE = {
    "importance": ((1923, 770, 442), (2133, 850, 473)),
    "decayed": ((1845, 765, 427), (1862, 740, 416)),
    "min": ((1552, 495, 292), (1168, 413, 256)),
}
SLOTS = (6, 12, 16)
SCOPES = ("layer", "pool")
# Those that learn add floating-point numbers in an order that is the machine's: no exact number.
LEARNED = {"flashmoe", "river", "learned", "hedged"}


def test_every_policy_has_its_golden_numbers() -> None:
    assert set(POLICIES) - LEARNED == set(GOLDEN_MISSES) | set(GOLDEN_MISSES_BY_SCORE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", GOLDEN_MISSES)
def test_golden_misses(policy: str, scope: str) -> None:
    got = tuple(misses(policy, recorded(), slots, scope) for slots in SLOTS)
    assert got == GOLDEN_MISSES[policy][SCOPES.index(scope)]
    fewest = GOLDEN_MISSES["min"][SCOPES.index(scope)]
    assert all(count >= least for count, least in zip(got, fewest, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", GOLDEN_MISSES_BY_SCORE)
def test_golden_misses_of_a_trace_with_scores(policy: str, scope: str) -> None:
    """Red when importance goes by chosen experts alone, or takes scores for gates."""
    got = tuple(misses(policy, scored(), slots, scope) for slots in SLOTS)
    assert got == GOLDEN_MISSES_BY_SCORE[policy][SCOPES.index(scope)]


def test_importance_asks_for_scores_by_name() -> None:
    with pytest.raises(TraceInvalid, match=r"no router scores.*record --scores"):
        misses("importance", recorded(), 12)


def test_hedged_has_importance_where_scores_are_recorded() -> None:
    names = [
        list(hedged(Setting(trace, 12, warmup_steps=0), Background()).members)
        for trace in (recorded(), scored())
    ]
    assert ["importance" in each for each in names] == [False, True]


@pytest.mark.parametrize("policy", ["decayed", "importance"])
def test_the_half_life_is_the_settings(policy: str) -> None:
    found = {
        replay(setting, POLICIES[policy](setting, Background())).misses
        for setting in (Setting(scored(), 12, "layer", 0, 0, tokens) for tokens in (4.0, 16.0))
    }
    assert len(found) == 2


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", GOLDEN_MISSES)
def test_the_order_within_an_event_does_not_matter(policy: str, scope: str) -> None:
    trace = recorded()
    turned = trace_of(trace.topk_ids[:, :, ::-1].tolist(), 32, trace.seq_offsets.tolist())
    assert misses(policy, turned, 12, scope) == misses(policy, trace, 12, scope)


class Scripted:
    """A cache that hits where it is told."""

    def __init__(self, hits: list[bool]) -> None:
        self._hits = iter(hits)

    def step(self, event: DecodeAccess) -> Hits:
        return np.full(event.topk_ids.shape, next(self._hits))


def test_warm_up_is_replayed_and_not_counted() -> None:
    trace = trace_of([[[0, 1]]] * 4, 4)
    setting = Setting(trace, slots=2, warmup_steps=1)
    outcome = replay(setting, Scripted([False, True, False, True]))
    assert (outcome.misses, outcome.hit_ratio) == (2, pytest.approx(2 / 3))
    assert misses("lru", trace, 2, warmup_steps=0) == 2
    assert misses("lru", trace, 2, warmup_steps=1) == 0, "the cache was warm"


class Tardy:
    """Ranks the experts of the last step highest."""

    def __init__(self) -> None:
        self._ranks = np.zeros((1, 4))

    def observe(self, event: DecodeAccess) -> None:
        self._ranks = np.zeros((1, 4))
        self._ranks[0, event.topk_ids[0]] = 1.0

    def ranks(self) -> Ranks:
        return self._ranks.copy()


@pytest.mark.parametrize(("lag_steps", "last_hits"), [(0, [True]), (1, [False])])
def test_advice_may_be_a_step_old(lag_steps: int, last_hits: list[bool]) -> None:
    """1 and 0 are resident when 2 comes. By what is known then they are alike, and 0 goes, by its
    number; by what was known the step before, 0 was wanted, and 1 goes.
    """
    trace = trace_of([[[1]], [[0]], [[2]], [[1]]], 4)
    cache = RankedCache(Tardy(), LayerSlots((1, 4), 2), lag_steps)
    hits = [cache.step(event)[0].tolist() for event in trace.events()]
    assert hits == [[False], [False], [False], last_hits]


def test_only_advised_policies_lag() -> None:
    trace = recorded()
    lagging = Setting(trace, 12, warmup_steps=0, lag_steps=1)
    local = replay(lagging, ranked(lagging, Lfru(trace.shape))).misses
    advised = replay(lagging, ranked(lagging, Lfru(trace.shape), advised=True)).misses
    assert local == 1241 != advised


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"slots": 3}, "give at least 4"),
        ({"slots": 32}, "hold all 32 experts of tiny-moe-decode, .*give fewer"),
        ({"scope": "model"}, "give layer or pool"),
        ({"lag_steps": 2}, "give 0 or 1"),
        ({"warmup_steps": -1}, "give 0 or more"),
    ],
)
def test_a_budget_that_is_none_is_refused(change: dict[str, Any], remedy: str) -> None:
    fine: dict[str, Any] = {"slots": 12, "warmup_steps": 0}
    Setting(recorded(), **fine)
    with pytest.raises(errors.InvalidRequest, match=remedy):
        Setting(recorded(), **{**fine, **change})


def test_a_trace_within_its_warm_up_is_refused() -> None:
    Setting(recorded(), 12, warmup_steps=359)
    with pytest.raises(TraceInvalid, match="smaller --warmup or a longer trace"):
        Setting(recorded(), 12, warmup_steps=360)


def test_gap_closed_is_the_share_of_the_way_from_lru_to_min() -> None:
    lru, optimum = Outcome(0.6, 40, 1.0), Outcome(0.8, 20, 1.0)
    assert gap_closed(Outcome(0.65, 35, 1.0), lru, optimum) == pytest.approx(0.25)
    assert gap_closed(Outcome(0.5, 50, 1.0), lru, optimum) == pytest.approx(-0.5)
    assert gap_closed(lru, lru, lru) is None


def test_the_document_is_the_one_the_issue_asks_for() -> None:
    setting = Setting(recorded(), 12, warmup_steps=100)
    outcomes = {
        name: replay(setting, POLICIES[name](setting, Background()))
        for name in ("lru", "decayed", "min")
    }
    document = json.loads(json.dumps(as_document(setting, outcomes)))
    policies = document.pop("policies")
    assert document == {
        "trace": "tiny-moe-decode",
        "num_steps": 360,
        "num_layers": 8,
        "num_experts": 32,
        "top_k": 4,
        "slots": 12,
        "scope": "layer",
        "warmup_steps": 100,
        "lag_steps": 0,
        "half_life_tokens": 16.0,
    }
    assert list(policies) == ["lru", "decayed", "min"]
    for policy in policies.values():
        assert set(policy) == {"hit_ratio", "misses", "gap_closed", "us_per_step"}
    assert (policies["lru"]["gap_closed"], policies["min"]["gap_closed"]) == (0.0, 1.0)
    accesses = 260 * 8 * 4
    assert policies["decayed"]["hit_ratio"] == 1 - policies["decayed"]["misses"] / accesses
