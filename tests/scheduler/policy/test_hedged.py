"""Who is put in charge, when and why, and what that is worth in a replay.

Planted faults seen red: gains that outlive a change, or go below zero; members never kept over the
scout, or the scout never followed again; a policy that decides the step that put it in charge, one
step late; a reason that names the wrong one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from scheduler.lab.policies import POLICIES, Background
from scheduler.policy.decayed import Decayed
from scheduler.policy.hedged import FIRST, LED, STEADY, Hedge, Hedged, Scout
from scheduler.policy.lfru import Lfru
from scheduler.policy.lru import Lru
from scheduler.simulate.replay import RankedCache, Setting, ranked, replay, slots_of
from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import recorded, trace_of


def observe(hedge: Hedge, steps: int, **ratios: float) -> None:
    for _ in range(steps):
        hedge.observe(ratios)


def test_the_first_is_in_charge_until_another_has_gained_enough() -> None:
    hedge = Hedge(["simple", "clever"])
    observe(hedge, 95, simple=0.5, clever=0.51)
    assert (hedge.in_charge, hedge.reason.kind, hedge.num_switches) == ("simple", FIRST, 0)
    observe(hedge, 10, simple=0.5, clever=0.51)
    assert (hedge.in_charge, hedge.num_switches) == ("clever", 1)
    assert hedge.reason.over == "simple"
    assert 95 < hedge.reason.at_step < 106
    assert hedge.reason.lead_steps == pytest.approx(hedge.reason.at_step, rel=0.05)  # decayed
    assert hedge.reason.lead_ratio == pytest.approx(0.01, rel=0.05)


def test_a_scouts_lead_begins_anew_once_it_is_lost() -> None:
    scout = Scout(2)
    for _ in range(50):
        for ratios in [[0.5, 0.51]] * 150 + [[0.9, 0.0]] * 2:
            assert scout.observe(np.array(ratios)) is None
    changes = [scout.observe(np.array([0.5, 0.51])) for _ in range(250)]
    [(lead_ratio, steps)] = [change for change in changes if change]
    assert (scout.choice, steps) == (1, 201)
    assert lead_ratio == pytest.approx(0.01)


def test_of_two_that_gained_alike_the_simpler_takes_over() -> None:
    hedge = Hedge(["simple", "middle", "clever"])
    observe(hedge, 200, simple=0.1, middle=0.6, clever=0.6)
    assert hedge.in_charge == "middle"
    assert hedge.num_switches == 1


def test_turns_that_last_are_followed() -> None:
    hedge = Hedge(["one", "other"])
    for turn in range(20):
        ahead = ("other", "one")[turn % 2]
        observe(hedge, 200, **{"one": 0.5, "other": 0.5, ahead: 0.6})
        assert hedge.in_charge == ahead
    assert hedge.num_switches == 20
    assert (hedge.reason.kind, hedge.reason.over) == (LED, "other")
    assert hedge.reason.lead_ratio == pytest.approx(0.1)


def test_turns_that_do_not_last_are_not() -> None:
    """Each lasts until the scout has just gone over. Red when the scout is always followed."""
    hedge = Hedge(["one", "other"])
    for turn in range(100):
        ahead = ("other", "one")[turn % 2]
        observe(hedge, 22, **{"one": 0.5, "other": 0.5, ahead: 0.6})
    assert hedge.num_switches <= 4
    assert hedge.reason.kind == STEADY


def drifting(num_steps: int, random: np.random.Generator) -> list[np.ndarray]:
    """[L, K] a step: what is used moves on through all experts; the last used is the best guess."""
    return [
        np.stack(
            [random.choice((step // 6 * 2 + at + np.arange(9)) % 32, 4, False) for at in range(2)]
        )
        for step in range(num_steps)
    ]


def favourites(num_steps: int, random: np.random.Generator) -> list[np.ndarray]:
    """[L, K] a step: two of eight favourites, two of the others in turn."""
    return [
        np.stack(
            [
                np.r_[random.choice(8, 2, False), 8 + (2 * step + np.arange(2)) % 24]
                for _ in range(2)
            ]
        )
        for step in range(num_steps)
    ]


def scan(num_steps: int, random: np.random.Generator) -> list[np.ndarray]:
    """[L, K] a step: twenty experts round and round, which no slots short of them can help."""
    return [np.tile((4 * step + np.arange(4)) % 20, (2, 1)) for step in range(num_steps)]


def regimes(length_steps: int, *makes: Callable[..., list[np.ndarray]]) -> AccessTrace:
    random = np.random.default_rng(0)
    turns = range(4000 // length_steps)
    steps = [step for turn in turns for step in makes[turn % len(makes)](length_steps, random)]
    return trace_of([step.tolist() for step in steps], 32)


def local_members(setting: Setting) -> dict[str, RankedCache]:
    shape = setting.trace.shape
    policies = {"decayed": Decayed(shape), "lru": Lru(shape), "lfru": Lfru(shape)}
    return {name: ranked(setting, policy) for name, policy in policies.items()}


@pytest.mark.parametrize("slots", [8, 12, 16])
@pytest.mark.parametrize(
    "trace",
    [
        regimes(4000, drifting),
        regimes(4000, favourites),
        regimes(4000, scan),
        regimes(20, drifting, favourites),
        regimes(50, drifting, favourites),
        regimes(70, drifting, favourites),
        regimes(500, drifting, favourites),
        regimes(400, drifting, scan, favourites),
    ],
    ids=["drifting", "favourites", "scan", "turns-20", "turns-50", "turns-70", "turns-500", "all"],
)
def test_within_two_tenths_of_a_point_of_the_best_member(trace: AccessTrace, slots: int) -> None:
    """Nothing to choose, one regime, and two in turn at lengths that could make it always late."""
    setting = Setting(trace, slots, warmup_steps=0)
    best = max(replay(setting, member).hit_ratio for member in local_members(setting).values())
    hedged = Hedged(local_members(setting), slots_of(setting))
    assert replay(setting, hedged).hit_ratio > best - 0.002


def test_gains_where_the_best_policy_changes() -> None:
    """Better than any one of its members. Red when it never switches."""
    setting = Setting(regimes(500, drifting, favourites), 12)
    best = max(replay(setting, member).hit_ratio for member in local_members(setting).values())
    hedged = Hedged(local_members(setting), slots_of(setting))
    assert replay(setting, hedged).hit_ratio > best + 0.02


def test_one_member_alone_is_that_member() -> None:
    """Lag and all: who decides a step knows as much of it as the member itself."""
    trace = recorded()
    counted = []
    for lag_steps in (0, 1):
        setting = Setting(trace, 12, warmup_steps=0, lag_steps=lag_steps)
        alone = Hedged(
            {"lfru": ranked(setting, Lfru(trace.shape), advised=True)}, slots_of(setting)
        )
        member = ranked(setting, Lfru(trace.shape), advised=True)
        counted.append(replay(setting, alone).misses)
        assert counted[-1] == replay(setting, member).misses
    assert counted[0] != counted[1]


def test_replays_by_name_over_what_may_be_in_charge_live() -> None:
    setting = Setting(recorded(), 12, warmup_steps=60)
    hedged = POLICIES["hedged"](setting, Background())
    assert isinstance(hedged, Hedged)
    assert set(hedged.members) == {"decayed", "lru", "lfru", "river"}
