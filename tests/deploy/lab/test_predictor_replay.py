"""What recorded predictors would have foreseen of a cache's misses.

Planted faults seen red: residents counted as guesses, the warm-up counted, a distance taken for
another, misses of layers that nobody spoke about counted, no correction, the last predictor asked
first, misses of a pool by what was resident before the step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compute_node.predict.drift import corrected
from deploy.lab.predictor_replay import IN_TURN, Foresight, replay_predictors
from proto import errors
from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Setting, replay
from scheduler.simulate.trace import AccessTrace, TraceInvalid
from tests.scheduler.replays import trace_of

E = 4
# Two slots of four hold what was used last, so that each step misses both experts of its layer.
STEPS = [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 1], [0, 1]], [[2, 3], [2, 3]]]


def naming(*experts: int) -> list[float]:
    """Scores by which these are the best, the first before the second."""
    return [2.0 - experts.index(e) / 2 if e in experts else -e / 10 for e in range(E)]


SILENT = [np.nan] * E


def said(*steps: list[list[list[float]]]) -> AccessTrace:
    """What `map` said at each step: [L, N, E]."""
    truth = [[naming(*layer) for layer in step] for step in STEPS]
    return replace(
        trace_of(STEPS, E),
        said={"map": np.array(steps, np.float16)},
        truth=np.array(truth, np.float16),
    )


def replayed(trace: AccessTrace, warmup: int = 1) -> dict[tuple[str, int, bool], Foresight]:
    found = replay_predictors(Setting(trace, 2, warmup_steps=warmup), "lru", Background())
    return {(each.predictor, each.layers_ahead, each.is_corrected): each for each in found}


def counts(one: Foresight) -> tuple[int, int, int]:
    return one.misses, one.named, one.right


def test_misses_are_counted_by_layers_ahead() -> None:
    """At the steps counted both experts of a layer miss. One ahead, layer 1 is named half rightly,
    with one that is resident; two ahead nothing is right; nobody spoke of layer 0.
    """
    half = [[SILENT, SILENT], [naming(2, 1), naming(0, 1)]]
    other = [[SILENT, SILENT], [naming(0, 3), naming(2, 3)]]
    found = replayed(said(half, half, other, half))
    near, far = found["map", 1, False], found["map", 2, False]
    assert counts(near) == (6, 3, 3) and near.num_layers == 1
    assert (near.recall, near.precision) == (0.5, 1.0)
    assert counts(far) == (6, 0, 0), "what is resident is no guess"
    assert (far.recall, far.precision) == (0.0, 0.0)


def test_what_a_pool_evicts_within_a_step_is_a_miss() -> None:
    """What layer 1 wants is the oldest, and makes room for layer 0 before its turn."""
    steps = [[[0, 1], [0, 1]], [[0, 1], [2, 3]], [[0, 1], [4, 5]], [[2, 3], [0, 1]]]
    right = np.full((4, 2, 1, 6), np.nan, np.float16)
    right[:, 1, 0] = [np.isin(range(6), step[1]) for step in steps]
    trace = replace(trace_of(steps, 6), said={"map": right}, truth=right[:, :, 0])
    setting = Setting(trace, 4, scope="pool", warmup_steps=3)
    found = replay_predictors(setting, "lru", Background())[0]
    assert counts(found) == (2, 2, 2)
    whole = replay(setting, POLICIES["lru"](setting, Background()))
    assert whole.misses == 2 + 2, "nothing was said of layer 0"


def test_the_warm_up_is_not_counted() -> None:
    right = [[SILENT], [naming(2, 3)]]
    found = replayed(said(right, right, right, right), warmup=3)
    assert counts(found["map", 1, False]) == (2, 2, 2)


def test_what_was_lately_wrong_is_corrected() -> None:
    """It always prefers expert 3 too much and is right otherwise."""
    trace = trace_of([[[0, 1], [step % 2, 2]] for step in range(60)], E)
    truth = np.array([[naming(0, 1), naming(step % 2, 2)] for step in range(60)], np.float16)
    wrong = truth[:, :, None].copy()
    wrong[:, 1, 0, 3] += 4.0
    wrong[:, 0] = np.nan
    trace = replace(trace, said={"next_router": wrong}, truth=truth)
    found = replayed(trace, warmup=40)
    assert counts(found["next_router", 1, False]) == (20, 40, 20)
    assert counts(found["next_router", 1, True]) == (20, 20, 20)


def test_the_first_that_knows_is_asked() -> None:
    """`map` is silent at every other step; the next router is always wrong."""
    right, none = [[SILENT], [naming(2, 3)]], [[SILENT], [SILENT]]
    trace = said(right, right, none, right)
    wrong = np.full((4, 2, 1, E), np.nan, np.float16)
    wrong[:, 1, 0] = naming(0, 1)
    trace = replace(trace, said={**trace.said, "next_router": wrong})
    found = replayed(trace)
    assert counts(found[IN_TURN, 1, False]) == (6, 6, 6)
    assert counts(found["map", 1, False]) == (4, 4, 4)
    assert counts(found["next_router", 1, False]) == (6, 2, 2)


def test_correction_passes_over_what_was_not_said() -> None:
    scores = np.array([[[1.0, 1.0]], [[np.nan, np.nan]], [[1.0, 1.0]]], np.float32)
    truth = np.full((3, 1, 2), 2.0, np.float32)
    found = corrected(scores, truth)
    np.testing.assert_allclose(found[2], 1.1, atol=1e-6)
    assert np.isnan(found[1]).all()


def test_a_trace_without_predictions_is_refused_in_one_sentence() -> None:
    with pytest.raises(TraceInvalid) as caught:
        replay_predictors(Setting(trace_of(STEPS, E), 2, warmup_steps=0), "lru", Background())
    assert str(caught.value) == (
        "small does not hold what predictors said: record it again with `flashmoe record "
        "--predictions`"
    )


def test_a_policy_that_keeps_no_ranks_is_refused() -> None:
    right = [[SILENT], [naming(2, 3)]]
    trace = said(right, right, right, right)
    with pytest.raises(errors.InvalidRequest, match="--policies decayed"):
        replay_predictors(Setting(trace, 2, warmup_steps=0), "s3fifo", Background())
    with pytest.raises(errors.InvalidRequest, match="one policy, not lru,decayed: name one"):
        replay_predictors(Setting(trace, 2, warmup_steps=0), "lru,decayed", Background())
