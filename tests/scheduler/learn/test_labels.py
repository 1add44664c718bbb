from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduler.learn.labels import DelayedLabels, Questions

HORIZON = 3
NUM_EXPERTS = 5


def ask(labels: DelayedLabels, step: int, experts: list[int]) -> None:
    """Rows carry (step, expert), so that an answer tells which question it settles."""
    rows = np.array([[float(step), float(expert)] for expert in experts])
    zeros = np.zeros(len(experts), np.intp)
    labels.ask(Questions(zeros, np.array(experts), rows, rows[:, 0] / 100, step / 100))


def used(experts: set[int]) -> np.ndarray:
    mask = np.zeros((1, NUM_EXPERTS), np.bool_)
    mask[0, list(experts)] = True
    return mask


def test_true_as_soon_as_used_false_when_the_horizon_has_passed() -> None:
    """Red when "no" comes one step early or late, or "yes" waits for the horizon."""
    labels = DelayedLabels(HORIZON, 2, 2)
    ask(labels, 0, [1, 2])
    assert len(labels.answer(used({0})).reused) == 0
    answers = labels.answer(used({1}))
    assert (answers.rows.tolist(), answers.reused.tolist()) == ([[0.0, 1.0]], [True])
    answers = labels.answer(used({0}))
    assert (answers.rows.tolist(), answers.reused.tolist()) == ([[0.0, 2.0]], [False])
    assert labels.num_open == 0


def test_a_use_in_the_last_step_of_the_horizon_counts() -> None:
    """Red when expiry is looked at before use."""
    labels = DelayedLabels(HORIZON, 2, 2)
    ask(labels, 0, [1])
    labels.answer(used({0}))
    labels.answer(used({0}))
    assert labels.answer(used({1})).reused.tolist() == [True]


def test_what_was_said_when_asked_comes_back() -> None:
    """Red when the prediction or the base rate of another turn is returned."""
    labels = DelayedLabels(HORIZON, 2, 2)
    ask(labels, 7, [1, 2])
    labels.answer(used(set()))
    ask(labels, 8, [3])
    answers = labels.answer(used({3, 1}))
    assert answers.predicted.tolist() == answers.base_rates.tolist() == [0.07, 0.08]


@given(
    trace=st.lists(st.sets(st.integers(0, NUM_EXPERTS - 1)), min_size=1, max_size=20),
    data=st.data(),
)
def test_never_peeks_and_never_errs(trace: list[set[int]], data: st.DataObject) -> None:
    """Every answer agrees with the trace, is given as early as it can be known, and only once.

    Red when a question is answered from a use before it was asked, or left open for ever.
    """
    labels = DelayedLabels(HORIZON, 3, 2)
    settled: dict[tuple[int, int], tuple[int, bool]] = {}
    asked: list[tuple[int, int]] = []
    for step, experts in enumerate(trace):
        answers = labels.answer(used(experts))
        for (asked_at, expert), reused in zip(answers.rows, answers.reused, strict=True):
            question = (int(asked_at), int(expert))
            assert question not in settled
            settled[question] = (step, bool(reused))
        if data.draw(st.booleans()):
            chosen = data.draw(st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=3))
            if chosen:
                ask(labels, step, sorted(chosen))
                asked += [(step, expert) for expert in chosen]
    for step, expert in asked:
        uses = [t for t in range(step + 1, step + HORIZON + 1) if t < len(trace)]
        reuse = [t for t in uses if expert in trace[t]]
        if reuse:
            assert settled[step, expert] == (reuse[0], True)
        elif step + HORIZON < len(trace):
            assert settled[step, expert] == (step + HORIZON, False)
        else:
            assert (step, expert) not in settled
