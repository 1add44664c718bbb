from __future__ import annotations

import numpy as np
import pytest

from scheduler.learn.features import (
    GATE_DECAY,
    MAX_AGE_STEPS,
    RARE,
    UNHEARD,
    Features,
    feature_names,
)
from scheduler.learn.followers import PRIOR, Followers
from scheduler.learn.recall import AHEAD_DECAY, TEMPERATURE, Recall, StepMemory
from tests.scheduler.traces import decode_step, prefill

HALF_LIVES = (1.0, 2.0)
NAMES = feature_names(HALF_LIVES)


def features_of(num_layers: int, num_experts: int) -> Features:
    shape = (num_layers, num_experts)
    recall = Recall(shape, StepMemory(shape, 64))
    return Features(shape, HALF_LIVES, Followers(*shape), recall)


def row(features: Features, layer: int, expert: int) -> dict[str, float]:
    values = features.rows(np.array([layer]), np.array([expert]))[0]
    return dict(zip(NAMES, values.tolist(), strict=True))


def fed(*steps: list[list[int]]) -> Features:
    features = features_of(1, 4)
    for number, ids in enumerate(steps):
        features.update(decode_step(ids, step=number, num_experts=4))
    return features


def test_golden_on_a_trace_by_hand() -> None:
    """Expert 0 at steps 1, 2 and 4 of 5: gaps 1 and 2, age 1.

    Red when the newest use is not counted, gaps are taken after the update, or decay is off by one.
    """
    got = row(fed([[0, 1]], [[0, 1]], [[1, 2]], [[0, 2]], [[1, 2]]), 0, 0)
    once = 0.5  # 1 - 2 ** (-1 / half_life)
    frequency_1 = once * (0.5**4 + 0.5**3 + 0.5)
    keep = 0.5**0.5
    frequency_2 = (1 - keep) * (keep**4 + keep**3 + keep)
    gap_mean = 1 + 0.2 * 1
    gap_variance = 0.8 * 0.2 * 1
    after_1 = 2 / (3 + PRIOR)  # in two of the three steps that came after expert 1
    after_2 = 1 / (2 + PRIOR)
    follows = (after_1 + after_2) / 2  # the last step chose experts 1 and 2
    less = np.exp(-1 / TEMPERATURE)  # step 3 has both of them, the other three have one
    recalled_next = (less + 1) / (3 * less + 1)
    first, second, third = 1.0, AHEAD_DECAY, AHEAD_DECAY**2
    come = less * (first + third) + less * second + first
    all_come = 3 * less + 1 + (2 * less + 1) * second + 2 * less * third + less * AHEAD_DECAY**3
    assert got == pytest.approx(
        {
            "log_age": np.log(2),
            "log_frequency_1": np.log(frequency_1 + RARE),
            "log_frequency_2": np.log(frequency_2 + RARE),
            "log_gap_mean": np.log1p(gap_mean),
            "log_gap_std": 0.5 * np.log1p(gap_variance),
            "age_over_gap": 1 / (1 + gap_mean),
            "gate_weight": 0.5 * (1 - (1 - GATE_DECAY) ** 3),
            "log_follows": np.log(follows + RARE),
            "log_recalled_next": np.log(recalled_next + UNHEARD),
            "log_recalled_soon": np.log(come / all_come + UNHEARD),
        }
    )


def test_only_steps_of_one_sequence_follow_each_other() -> None:
    """Red when the first step of a generation is learned as follower of another's last."""
    features = features_of(1, 4)
    features.update(decode_step([[0, 1]], num_experts=4, sequence="one"))
    features.update(decode_step([[2, 3]], num_experts=4, sequence="two"))
    features.update(decode_step([[0, 1]], num_experts=4, sequence="two"))
    assert row(features, 0, 2)["log_follows"] == pytest.approx(np.log(RARE))
    features.update(decode_step([[2, 3]], num_experts=4, sequence="two"))
    assert row(features, 0, 0)["log_follows"] == pytest.approx(np.log(1 / (1 + PRIOR) + RARE))


def test_an_expert_never_used_looks_old_and_rare() -> None:
    """Red when unused experts start with age 0."""
    got = row(fed([[0, 1]]), 0, 3)
    assert got["log_age"] == pytest.approx(np.log1p(MAX_AGE_STEPS))
    assert got["log_frequency_2"] == pytest.approx(np.log(RARE))
    assert got["gate_weight"] == 0


def test_rows_are_the_table_and_asking_changes_nothing() -> None:
    """Red when rows and table mix up layer and expert, or when asking moves the clock."""
    features = features_of(2, 8)
    for step, ids in enumerate(([[0, 1], [2, 3]], [[4, 5], [2, 7]])):
        features.update(decode_step(ids, step=step))
    before = features.table()
    layers, experts = np.array([0, 1, 1]), np.array([4, 2, 7])
    np.testing.assert_array_equal(
        features.rows(layers, experts), before[:, layers, experts].T, strict=True
    )
    np.testing.assert_array_equal(features.table(), before)
    assert before.shape == (len(NAMES), 2, 8)
    assert np.isfinite(before).all()


def test_a_prompt_counts_as_its_tokens_spread_evenly() -> None:
    """Red when a prompt of 64 tokens weighs as much as one step, or moves the clock."""
    features = features_of(1, 4)
    features.update_prefill(prefill([[64, 32, 0, 16]], num_tokens=64))
    frequencies = [np.exp(row(features, 0, e)["log_frequency_2"]) - RARE for e in range(4)]
    assert frequencies == pytest.approx([1, 0.5, 0, 0.25], abs=1e-6)
    assert features.num_steps == 0


def test_an_empty_prompt_is_no_division_by_zero() -> None:
    features = features_of(1, 4)
    features.update_prefill(prefill([[0, 0, 0, 0]], num_tokens=0))
    assert np.isfinite(features.table()).all()
