"""What is recalled of steps by hand, and against a search that looks at every step.

Planted faults seen red: a full memory reads past its newest step;
hidden steps are looked at; shares that do not count a step's distance.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.learn.recall import (
    AHEAD_DECAY,
    NUM_AHEAD,
    NUM_NEIGHBOURS,
    TEMPERATURE,
    Recall,
    StepMemory,
)

SHAPE = (2, 8)


def step(*experts: int) -> np.ndarray:
    """Both layers choose the same experts."""
    return np.array([experts, experts], np.intp)


def recall_of(*steps: np.ndarray, capacity: int = 64) -> Recall:
    recall = Recall(SHAPE, StepMemory(SHAPE, capacity))
    for chosen in steps:
        recall.learn(chosen)
    return recall


def test_recalls_what_came_after_the_same_step() -> None:
    recall = recall_of(step(0, 1), step(2, 3), step(4, 5), step(0, 1))
    following, soon = recall.shares(step(0, 1))
    assert following[0].nonzero()[0].tolist() == [2, 3]
    assert following[0, 2] == 1.0
    weights = np.array([1.0, AHEAD_DECAY, AHEAD_DECAY**2])
    np.testing.assert_allclose(soon[1, [2, 4, 0]], weights / weights.sum())


def test_knows_nothing_of_a_first_step_or_one_like_none() -> None:
    assert not recall_of(step(0, 1)).shares(step(0, 1)).any()
    assert not recall_of(step(0, 1), step(2, 3)).shares(step(6, 7)).any()


def test_forgets_the_oldest() -> None:
    steps = [step(0, 1), step(2, 3), step(4, 5), step(6, 7), step(4, 6)]
    assert recall_of(*steps, capacity=5).shares(step(0, 1)).any()
    assert not recall_of(*steps, step(5, 7), capacity=4).shares(step(0, 1)).any()


def test_looks_into_every_memory_but_not_at_what_is_hidden() -> None:
    known = StepMemory(SHAPE, 8)
    for chosen in (step(0, 1), step(2, 3)):
        known.append(chosen)
    recall = Recall(SHAPE, known, StepMemory(SHAPE, 8))
    recall.learn(step(0, 1))
    assert recall.shares(step(0, 1))[0, 0, 2] == 1.0
    for hidden in (slice(0, 1), slice(1, 2)):
        known.hidden = hidden
        assert not recall.shares(step(0, 1)).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 90), st.sampled_from([5, 40, 64]))
def test_equals_a_search_step_by_step(seed: int, num_steps: int, capacity: int) -> None:
    """Steps share at most one expert a layer, so ties are few and the cut at the last is seen."""
    random = np.random.default_rng(seed)
    steps = np.argsort(random.random((num_steps, *SHAPE)), axis=2)[..., :2]
    got = recall_of(*steps, capacity=capacity).shares(steps[-1])
    np.testing.assert_allclose(got, searched(steps, capacity), atol=1e-12)


def searched(steps: np.ndarray, capacity: int) -> np.ndarray:
    newest, oldest = len(steps) - 1, max(0, len(steps) - capacity)
    used = np.zeros((len(steps), *SHAPE), bool)
    np.put_along_axis(used, steps, True, axis=2)
    common = {at: int((used[at] & used[newest]).sum()) for at in range(oldest, newest)}
    ranked = sorted(common.values(), reverse=True) or [0]
    least = max(1, ranked[min(NUM_NEIGHBOURS, len(ranked)) - 1])
    shares = np.zeros((2, *SHAPE))
    totals = np.zeros(2)
    best = max([count for count in common.values() if count >= least], default=0)
    for at, count in common.items():
        for ahead in range(1, NUM_AHEAD + 1):
            if count >= least and at + ahead <= newest:
                weight = np.exp((count - best) / TEMPERATURE) * AHEAD_DECAY ** (ahead - 1)
                for horizon in range(0 if ahead == 1 else 1, 2):
                    shares[horizon] += weight * used[at + ahead]
                    totals[horizon] += weight
    return shares / np.maximum(totals, 1e-300)[:, None, None]


@pytest.mark.parametrize("shape", [(1, 3), (3, 70)])
def test_any_number_of_experts_is_packed(shape: tuple[int, int]) -> None:
    memory = StepMemory(shape, 4)
    last = np.full((shape[0], 1), shape[1] - 1)
    for chosen in (last, np.zeros_like(last), last):
        memory.append(chosen)
    following = Recall(shape, memory).shares(last)[0]
    assert following[:, 0].tolist() == [1.0] * shape[0]


def test_a_large_memory_is_sifted_and_recalls_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of twelve topics, so that neighbours share much, as they do in a model."""
    random = np.random.default_rng(3)
    shape, num_steps = (12, 32), 6000
    topics = np.argsort(random.random((12, *shape)), axis=2)[..., :6]
    chosen = topics[random.integers(12, size=num_steps)]
    steps = np.take_along_axis(chosen, np.argsort(random.random(chosen.shape), axis=2), 2)[..., :4]
    shares = []
    for sifted_words in (1_000_000, 1_000):
        monkeypatch.setattr("scheduler.learn.recall.SIFTED_WORDS", sifted_words)
        recall = Recall(shape, StepMemory(shape, num_steps))
        for step_chosen in steps:
            recall.learn(step_chosen)
        shares.append(recall.shares(steps[-1]))
    assert shares[0].any()
    assert np.abs(shares[0] - shares[1]).sum() < 0.1 * shares[0].sum()
