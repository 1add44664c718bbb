"""A guard leaves a rung that costs too much for a tighter one, tries it again later and later, and
checks less the more it knows.

Planted faults seen red: a check counted for the rung that came after, patience that does not grow,
checks of exact tokens, a rung left for its estimate alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from compute_node.quality.divergence import Divergence
from compute_node.quality.guard import FIRST_PATIENCE_TOKENS, Guard
from compute_node.quality.turns import OneRoute, Rung
from proto.quality import Budget

RUNGS = (Rung(), Rung("tight"), Rung("loose"))
Costs = dict[str, Callable[[], float]]  # KL of a checked token, by route


def guard_of(budget: str = "1%") -> Guard:
    return Guard(Budget.parse(budget), RUNGS)


def decode(guard: Guard, costs: Costs, num_tokens: int) -> list[str]:
    """Routes of the tokens."""
    routes = list[str]()
    for _ in range(num_tokens):
        turn = guard.next()
        routes.append(turn.rung.route)
        if turn.is_checked:
            guard.heard(turn, Divergence(costs[turn.rung.route](), True))
    return routes


def costs_of(seed: int, **means: float) -> Costs:
    """Heavy tails, as KL has."""
    rng = np.random.default_rng(seed)

    def draw(mean: float) -> float:
        return float(mean * rng.lognormal(0, 1.2) / np.exp(1.2**2 / 2))

    return {route: lambda mean=mean: draw(mean) for route, mean in means.items()}


def test_a_rung_that_costs_too_much_gives_way() -> None:
    guard = guard_of()
    routes = decode(guard, costs_of(0, loose=0.05, tight=0.001), 600)
    assert routes[0] == "loose" and routes[-1] == "tight"
    assert guard.num_tightened == 1 and routes.count("loose") < 300
    assert guard.route == "tight" and guard.kl is not None and guard.kl < 0.005


def test_nothing_lossy_is_left_when_all_fail(caplog: pytest.LogCaptureFixture) -> None:
    guard = guard_of("0.1%")
    with caplog.at_level(logging.WARNING):
        routes = decode(guard, costs_of(0, loose=0.02, tight=0.02), 600)
    assert routes[-1] == "" and guard.route == "exact"
    assert guard.estimate is None, "exact tokens are not checked"
    events = [record for record in caplog.records if record.message == "quality tightened"]
    assert [(event.from_route, event.to_route) for event in events] == [  # type: ignore[attr-defined]
        ("loose", "tight"),
        ("tight", "exact"),
    ]
    assert all(event.kl_low >= event.kl_limit for event in events)  # type: ignore[attr-defined]


def test_a_rung_that_failed_is_tried_again_later_and_later() -> None:
    guard = guard_of()
    routes = decode(guard, costs_of(0, loose=0.2, tight=0.0001), 16 * FIRST_PATIENCE_TOKENS)
    starts = [at for at in range(1, len(routes)) if routes[at - 1 : at + 1] == ["tight", "loose"]]
    waits = np.diff([0, *starts])
    assert len(starts) == 4 and guard.num_relaxed == 4
    ratios = waits[1:] / waits[:-1]
    assert ((ratios > 1.8) & (ratios < 2.2)).all()
    assert routes.count("loose") < 0.02 * len(routes)


def test_what_became_fine_is_kept() -> None:
    guard = guard_of()
    decode(guard, costs_of(0, loose=0.2, tight=0.0001), 1000)
    assert guard.route == "tight"
    decode(guard, costs_of(0, loose=0.001, tight=0.0001), 8 * FIRST_PATIENCE_TOKENS)
    assert guard.route == "loose" and guard.num_relaxed == 1


def test_checks_are_often_at_first_and_rare_once_settled() -> None:
    guard = guard_of()
    costs = costs_of(0, loose=0.001)
    decode(guard, costs, 256)
    assert 55 <= guard.num_checks <= 70
    decode(guard, costs, 10_000)
    settled = guard.num_checks
    decode(guard, costs, 12_800)
    assert 90 <= guard.num_checks - settled <= 140


def test_what_looks_bad_is_looked_at_token_after_token() -> None:
    """Half as much again as the limit, of heavy tails: too little to notice in rare checks."""
    noticed = list[int]()
    for seed in range(12):
        routes = decode(guard_of(), costs_of(seed, loose=0.015, tight=0.0001), 1000)
        noticed.append(routes.count("loose"))
    assert sorted(noticed)[9] < 600


def test_a_setting_within_its_budget_is_left_alone() -> None:
    changed = 0
    for seed in range(20):
        guard = guard_of()
        decode(guard, costs_of(seed, loose=0.004, tight=0.001), 5000)
        changed += guard.num_tightened > 0
    assert changed <= 1


def test_a_check_of_another_trial_counts_for_nothing() -> None:
    guard = guard_of()
    old = guard.next()
    while guard.route == "loose":
        guard.heard(old, Divergence(0.5, False))
    guard.heard(old, Divergence(0.5, False))
    assert guard.estimate is None and guard.route == "tight"


def test_dear_tokens_at_the_beginning_are_no_verdict() -> None:
    """What a prompt leaves resident fits the first tokens after it less."""
    guard = guard_of()
    costs = iter([0.2] * 3 + [0.001] * 2000)
    routes = decode(guard, {"loose": lambda: next(costs)}, 2000)
    assert set(routes) == {"loose"} and guard.kl_low is not None
    assert guard.kl_low > guard.kl_limit, "it was above the limit for a while"


def test_one_route_is_checked_as_often_as_asked() -> None:
    turns = OneRoute(Rung("prior .1"), 3)
    assert [turns.next().is_checked for _ in range(7)] == [False, False, True] * 2 + [False]
    assert not any(OneRoute(Rung()).next().is_checked for _ in range(7))
