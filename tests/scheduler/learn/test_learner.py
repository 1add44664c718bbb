from __future__ import annotations

import math

import numpy as np
import pytest

from scheduler.learn.labels import Answers
from scheduler.learn.learner import REMEMBERED_ROWS, ReuseModel

NAMES = ("a", "b", "constant")


def lesson(
    random: np.random.Generator, size: int = 64, *, flipped: bool = False, predicted: float = 0.5
) -> Answers:
    """`a` decides, `b` is noise on another scale, the last never varies."""
    rows = np.column_stack(
        [random.normal(3, 2, size), random.normal(-500, 90, size), np.full(size, 7.0)]
    )
    reused = (rows[:, 0] > 3) != flipped
    return Answers(rows, np.full(size, predicted), np.full(size, 0.5), reused)


def taught(num_lessons: int = 40, seed: int = 0) -> ReuseModel:
    random = np.random.default_rng(seed)
    model = ReuseModel(NAMES)
    for _ in range(num_lessons):
        model.learn(lesson(random))
    return model


def test_a_table_scores_as_river_scores_row_by_row() -> None:
    """Red when a moment, the bias or a feature without variance is folded in wrongly."""
    model = taught()
    table = np.random.default_rng(1).normal(0, 300, (len(NAMES), 4, 5))
    scores = model.predict(table)
    for layer, expert in np.ndindex(4, 5):
        row = dict(zip(NAMES, table[:, layer, expert].tolist(), strict=True))
        assert scores[layer, expert] == pytest.approx(
            model.pipeline.predict_proba_one(row)[True], abs=1e-6
        )


def test_before_any_lesson_every_score_is_one_half() -> None:
    assert ReuseModel(NAMES).predict(np.ones((3, 2, 2))).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_learns_what_decides() -> None:
    """Red when rows and answers are paired wrongly, or the labels are turned."""
    model = taught()
    high, low = model.predict(np.array([[7.0, -1.0], [-500.0, -500.0], [7.0, 7.0]]))
    assert high > 0.7 > 0.3 > low


def test_the_losses_are_of_what_was_said_when_asked() -> None:
    """Progressive validation: red when the loss is taken after the lesson, or of today's answer."""
    model = ReuseModel(NAMES)
    rows = np.zeros((2, 3))
    answers = Answers(rows, np.array([0.8, 0.1]), np.array([0.5, 0.25]), np.array([True, False]))
    model.learn(answers)
    assert model.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.9)) / 2)
    assert model.baseline_log_loss == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert model.log_loss < model.baseline_log_loss
    assert model.labels_learned == 2


def test_a_certain_error_costs_a_finite_loss() -> None:
    """Red without the bound on probabilities."""
    model = ReuseModel(NAMES)
    model.learn(Answers(np.zeros((1, 3)), np.zeros(1), np.ones(1), np.array([True])))
    assert 10 < model.log_loss < 20


def test_the_contributions_add_up_to_the_score() -> None:
    """Red when a contribution is of the raw feature, or the bias is left out."""
    model = taught()
    row = [4.0, -480.0, 7.0]
    terms = model.explain(row)
    log_odds = model.bias + sum(term.contribution for term in terms)
    assert 1 / (1 + math.exp(-log_odds)) == pytest.approx(float(model.predict(np.array(row))))
    assert [term.name for term in terms] == list(NAMES)
    assert [term.value for term in terms] == row


def drifted() -> ReuseModel:
    random = np.random.default_rng(0)
    model = ReuseModel(NAMES)
    for _ in range(200):
        model.learn(lesson(random, predicted=0.9))
    assert model.drifts == 0
    for number in range(200):
        if model.drifts:
            break
        model.learn(lesson(random, flipped=True, predicted=0.001 * (number % 2)))
    return model


def test_drift_is_seen_counted_and_makes_the_learner_quick() -> None:
    """Red when the detector gets no loss, or a drift changes neither rate nor moments."""
    model = drifted()
    assert model.drifts == 1
    assert max(model.state().counts) <= REMEMBERED_ROWS
    steady, quick = taught(), taught()
    quick._on_drift()
    answers = lesson(np.random.default_rng(5), size=8, flipped=True)
    before = steady.state().weights
    steady.learn(answers)
    quick.learn(answers)
    moved = [np.abs(model.state().weights - before).max() for model in (steady, quick)]
    assert moved[1] > 2 * moved[0]


def test_the_learner_calms_down_after_a_drift() -> None:
    """Red when the higher rate stays."""
    model = taught()
    model._on_drift()
    random = np.random.default_rng(2)
    for _ in range(40):
        model.learn(lesson(random))
    steady = ReuseModel(NAMES)
    steady.restore(model.state())
    answers = lesson(random)
    model.learn(answers)
    steady.learn(answers)
    np.testing.assert_allclose(model.state().weights, steady.state().weights, rtol=1e-12)


def test_less_loss_is_no_drift() -> None:
    """Red when any change of the loss counts."""
    random = np.random.default_rng(0)
    model = ReuseModel(NAMES)
    for predicted in [0.01] * 100 + [0.5] * 100:
        model.learn(lesson(random, predicted=predicted))
    assert model.drifts == 0


def test_a_restored_model_goes_on_alike() -> None:
    """Red when weights, moments, counts or bias are left behind."""
    model, copy = taught(), ReuseModel(NAMES)
    copy.restore(model.state())
    answers = lesson(np.random.default_rng(3))
    for one in (model, copy):
        one.learn(answers)
    table = answers.rows.T
    np.testing.assert_allclose(copy.predict(table), model.predict(table), rtol=1e-12)
    assert copy.labels_learned == model.labels_learned
    assert copy.log_loss == pytest.approx(model.log_loss)
