from __future__ import annotations

import numpy as np
import pytest

from proto import errors
from proto.expert import ExpertKey
from scheduler.daemon.scorer import Scorer
from tests.scheduler.traces import decode_step, prefill, small_config, structured_trace

KEY = ExpertKey(layer=3, expert=2)


def test_tells_structure_from_noise() -> None:
    """Log loss below the mean's by far. Red when labels, features or rows are mixed up."""
    scorer = Scorer(small_config())
    for event in structured_trace(600):
        scorer.observe(event)
    model = scorer.model
    assert model.labels_learned > 10_000
    assert model.log_loss < 0.8 * model.baseline_log_loss
    scores = scorer.ranks("node-a")
    kept = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(kept, event.topk_ids.astype(np.intp), True, axis=1)
    assert scores[kept].min() > scores[~kept].max()


def test_asking_changes_nothing() -> None:
    """Red when scores or explain learn, move the clock or draw from the random numbers."""
    asked, silent = Scorer(small_config()), Scorer(small_config())
    for event in structured_trace(100):
        for scorer in (asked, silent):
            scorer.observe(event)
        asked.ranks("node-a")
        asked.explain(KEY)
    np.testing.assert_array_equal(asked.ranks("node-a"), silent.ranks("node-a"))
    assert asked.model.log_loss == silent.model.log_loss


def test_questions_carry_the_features_of_their_own_step() -> None:
    """Never peeks: what is predicted for step t is the same whatever comes after t.

    Red when an answer changes a question, or when the event asked about is not yet counted.
    """
    trace = list(structured_trace(40))
    scorers = Scorer(small_config()), Scorer(small_config())
    for event in trace[:30]:
        for scorer in scorers:
            scorer.observe(event)
    labels = [scorer._nodes["node-a"].river._labels for scorer in scorers]
    np.testing.assert_array_equal(labels[0]._rows, labels[1]._rows)
    scorers[0].observe(trace[30])
    scorers[1].observe(decode_step([[6, 7], [6, 7]], step=30))
    turn = labels[0]._turn - 1
    np.testing.assert_array_equal(labels[0]._rows[turn], labels[1]._rows[turn])
    np.testing.assert_array_equal(labels[0]._predicted[turn], labels[1]._predicted[turn])
    assert (labels[0]._rows[turn + 1] != labels[1]._rows[turn + 1]).any()


def test_without_lessons_the_state_still_follows() -> None:
    """Red when a skipped lesson loses the event too, or is not counted."""
    scorer = Scorer(small_config())
    scorer.observe(decode_step([[0, 1], [2, 3]]), learn=False)
    assert (scorer.lessons_skipped, scorer.model.labels_learned) == (1, 0)
    assert scorer._nodes["node-a"].river.features.num_steps == 1
    assert scorer._nodes["node-a"].river._labels.num_open == 0


def test_nodes_are_apart_bounded_and_the_oldest_goes() -> None:
    """Red when two nodes share a state, or when the newest is dropped, or nothing is counted."""
    scorer = Scorer(small_config(max_nodes=2))
    for node in ("a", "b", "a", "c"):
        scorer.observe(decode_step([[0, 1], [2, 3]], node=node))
    assert scorer.nodes == ["a", "c"]
    assert scorer.nodes_dropped == 1
    assert [scorer._nodes[n].river.features.num_steps for n in ("a", "c")] == [2, 1]


def test_missing_steps_are_counted() -> None:
    """Red when a gap in a sequence's steps goes unseen, or a new sequence counts as one."""
    scorer = Scorer(small_config())
    for step in (5, 6, 9):
        scorer.observe(decode_step([[0, 1], [2, 3]], step=step))
    assert scorer.steps_missed == 2


@pytest.mark.parametrize(
    "event",
    [
        decode_step([[0, 1]]),
        decode_step([[0, 1], [2, 3]], num_experts=16),
        prefill([[1] * 8], num_tokens=4),
    ],
)
def test_another_models_evidence_is_refused(event: object) -> None:
    """Red when a shape is not checked: numpy would broadcast one layer over all."""
    scorer = Scorer(small_config())
    with pytest.raises(errors.MessageInvalid, match="another model's"):
        scorer.observe(event)  # type: ignore[arg-type]
    assert (scorer.nodes, scorer.events_seen) == ([], 0)


def test_explains_a_score_by_its_parts() -> None:
    """Red when the model's layer number is taken for a row, or the parts are another expert's."""
    scorer = Scorer(small_config())
    for event in structured_trace(300):
        scorer.observe(event)
    scores = scorer.ranks("node-a")
    explanation = scorer.explain(KEY)
    assert explanation.score == pytest.approx(float(scores[1, 2]), abs=1e-6)
    log_odds = explanation.bias + sum(t.contribution for t in explanation.contributions)
    assert explanation.score == pytest.approx(1 / (1 + np.exp(-log_odds)))


@pytest.mark.parametrize("key", [ExpertKey(0, 0), ExpertKey(2, 0), ExpertKey(1, 8)])
def test_an_unknown_expert_is_refused(key: ExpertKey) -> None:
    """Layer 2 lies between two MoE layers. Red when the expert's number is not checked."""
    scorer = Scorer(small_config())
    scorer.observe(decode_step([[0, 1], [2, 3]]))
    with pytest.raises(errors.UnknownExpert):
        scorer.explain(key)


def test_explains_nothing_before_evidence() -> None:
    """Red when a scorer without evidence answers one half."""
    with pytest.raises(errors.NotReady):
        Scorer(small_config()).explain(KEY)
