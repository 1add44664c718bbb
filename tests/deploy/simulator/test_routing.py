"""Drawn routing: what its parts do, and that its constants are as good as it is said of them.

Planted faults seen red: one answer for ever, a fading part that is the answer's, nothing popular.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.simulator.routing import FITTED, Scores
from scheduler.policy.lru import Lru
from scheduler.simulate.replay import Setting, ranked, replay
from scheduler.simulate.trace import AccessTrace

NONE = Scores(0.0, 0.0, 0.0, 1.0)


def reuse(trace: AccessTrace, apart: int = 1) -> float:
    """Share of a token's experts that one so many tokens before used, too."""
    used = trace.used()
    return float((used[apart:] & used[:-apart]).sum() / used[apart:].sum())


def test_experts_of_a_token_differ_and_a_seed_fixes_them() -> None:
    drawn = FITTED.draw((3, 64), 8, 20, seed=1)
    assert drawn.topk_ids.shape == (20, 3, 8)
    assert all(len(set(row)) == 8 for row in drawn.topk_ids.reshape(-1, 8).tolist())
    assert (drawn.topk_ids == FITTED.draw((3, 64), 8, 20, seed=1).topk_ids).all()
    assert (drawn.topk_ids != FITTED.draw((3, 64), 8, 20, seed=2).topk_ids).any()


def test_what_is_new_with_each_token_is_uniform() -> None:
    assert reuse(NONE.draw((8, 32), 4, 800, 0)) == pytest.approx(4 / 32, abs=0.02)


@pytest.mark.parametrize("part", ["popular", "topical"])
def test_parts_that_last_are_used_again(part: str) -> None:
    """An answer's part goes with it, the expert's own does not."""
    drawn = replace(NONE, **{part: 3.0}).draw((8, 32), 4, 700, 0)
    assert reuse(drawn) > 0.6
    across = reuse(drawn, 350)
    assert (across > 0.6) == (part == "popular")


def test_what_fades_is_used_again_soon_and_not_later() -> None:
    drawn = replace(NONE, lasting=3.0, half_life_tokens=4.0).draw((8, 32), 4, 800, 0)
    assert reuse(drawn) > 0.5
    assert reuse(drawn, 40) < 0.2


@pytest.mark.parametrize(("slots", "recorded"), [(8, 0.661), (16, 0.899)])
def test_the_fit_hits_what_gpt_oss_20b_does(slots: int, recorded: float) -> None:
    """LRU on 59,554 recorded steps, as docs/figures.md has it."""
    trace = FITTED.draw((24, 32), 4, 1050, seed=0)
    setting = Setting(trace, slots, warmup_steps=100)
    hit_ratio = replay(setting, ranked(setting, Lru(trace.shape))).hit_ratio
    assert hit_ratio == pytest.approx(recorded, abs=0.03)
