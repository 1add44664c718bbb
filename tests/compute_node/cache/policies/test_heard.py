"""What a node hears of a step is one token's, newer than the advice, and the whole of what its
layers used up to each.

Planted faults seen red: a step of two tokens taken for one, layers after it corrected by the half
of the step that was one token's, a layer corrected by what the advice knows.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from compute_node.cache.policies.heard import Heard
from compute_node.cache.policies.scored import Scored
from proto.correction import Correction, corrected, shapes
from proto.expert import ExpertKey
from proto.redis_schema import Advice

LAYERS, EXPERTS, TOP_K = 3, 8, 2
IDS = np.array([[0, 1], [4, 2], [7, 3]])


@pytest.fixture
def correction() -> Correction:
    draw = np.random.default_rng(0).standard_normal
    sizes = shapes(LAYERS, EXPERTS, width=4)
    return Correction.of({name: draw(size).astype(np.float32) for name, size in sizes.items()})


def keys(row: int, experts: list[int]) -> list[ExpertKey]:
    return [ExpertKey(row, expert) for expert in experts]


def step(heard: Heard, ids: np.ndarray = IDS) -> None:
    for row, experts in enumerate(ids.tolist()):
        heard.on_step(row, keys(row, experts))


def test_layer_after_layer_is_the_step_at_once(correction: Correction) -> None:
    heard, clock = Heard(correction, TOP_K, lambda: next(clock)), count(1)
    for ids in (IDS[:, ::-1], IDS):  # the second step begins anew
        step(heard, ids)
        for row, expected in enumerate(correction.odds(ids)):
            np.testing.assert_allclose(heard.odds(row, as_of_ns=0), expected, rtol=1e-5)


def test_only_what_is_newer_than_the_advice_counts(correction: Correction) -> None:
    heard, clock = Heard(correction, TOP_K, lambda: next(clock)), count(1)
    step(heard)  # at 1, 2, 3
    assert [heard.odds(row, as_of_ns=2) is None for row in range(LAYERS)] == [True, True, False]


@pytest.mark.parametrize("crowded", range(LAYERS))
def test_a_step_of_several_tokens_says_nothing_from_there_on(
    correction: Correction, crowded: int
) -> None:
    heard = Heard(correction, TOP_K)
    step(heard)
    for row, experts in enumerate(IDS.tolist()):
        heard.on_step(row, keys(row, [*experts, 6] if row == crowded else experts))
    known = [heard.odds(row, as_of_ns=0) is not None for row in range(LAYERS)]
    assert known == [row < crowded for row in range(LAYERS)]


def test_scores_change_when_their_layer_is_heard(correction: Correction) -> None:
    """Layers still to come keep the advice's scores; without `unused_scores` all do."""
    scores, unused = np.random.default_rng(1).random((2, LAYERS, EXPERTS)).astype(np.float32)
    rows = {layer: layer for layer in range(LAYERS)}
    heard = Heard(correction, TOP_K)
    policy = Scored(Advice("learned", 1, 0, 1.0, scores, unused), scores, rows, heard)
    plain = Scored(Advice("river", 1, 0, 1.0, scores), scores, rows, heard)
    before = [policy.rank(ExpertKey(0, expert)) for expert in range(EXPERTS)]
    used = keys(0, IDS[0].tolist())
    for hears in (heard, policy, plain):
        hears.on_step(0, used)
    expected = corrected(unused, correction.odds(IDS))
    for expert in range(EXPERTS):
        assert before[expert] == plain.rank(ExpertKey(0, expert)) == scores[0, expert]
        assert policy.rank(ExpertKey(0, expert)) == pytest.approx(expected[0, expert], rel=1e-5)
        assert policy.rank(ExpertKey(1, expert)) == scores[1, expert]
