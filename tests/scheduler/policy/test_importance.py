"""The array-wise importance, against a plain statement of it.

Planted faults seen red: gates of chosen experts alone, no decay, weights taken for shares.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scheduler.policy.importance import Importance
from tests.scheduler.replays import scored
from tests.scheduler.traces import decode_step


def test_a_rank_is_the_decayed_sum_of_the_gates() -> None:
    trace = scored()
    policy = Importance(trace.shape, half_life_tokens=4.0)
    events = list(trace.events())[:10]
    for event in events:
        policy.observe(event)
    gates = [event.gates for event in events]
    expected = sum(
        each.astype(float) * 0.5 ** (age / 4.0)
        for age, each in enumerate(reversed(gates))
        if each is not None
    )
    np.testing.assert_allclose(policy.ranks(), expected, rtol=1e-12)


def test_a_step_without_gates_counts_the_shares_of_the_chosen() -> None:
    policy = Importance((2, 8))
    weights = np.array([[3.0, 1.0], [0.0, 0.0]], np.float16)
    policy.observe(replace(decode_step([[1, 2], [4, 5]]), topk_weights=weights))
    assert policy.ranks()[0].tolist() == [0, 0.75, 0.25, 0, 0, 0, 0, 0]
    assert policy.ranks()[1].tolist() == [0] * 8, "a trace without weights has zeros"


def test_ranks_are_a_copy() -> None:
    policy = Importance((2, 8))
    before = policy.ranks()
    policy.observe(decode_step([[1, 2], [4, 5]]))
    assert not before.any()
