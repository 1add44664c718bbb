"""Delayed labels: asks "used within h steps?" now, hears the answer later, never ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Questions:
    """Asked at one step.

    layers, experts: [R]
    rows:            [R, N], features as they were when asked
    predicted:       [R], the model's answer then
    base_rate:       the baseline's answer then
    """

    layers: NDArray[np.intp]
    experts: NDArray[np.intp]
    rows: Array
    predicted: Array
    base_rate: float


@dataclass(frozen=True)
class Answers:
    """Questions whose truth is known. reused: [A]; the rest as in Questions, of length A."""

    rows: Array
    predicted: Array
    base_rates: Array
    reused: NDArray[np.bool_]


class DelayedLabels:
    """Open questions of one node, a ring of `horizon_steps` turns of at most `num_rows` each."""

    def __init__(self, horizon_steps: int, num_rows: int, num_features: int) -> None:
        ring = (horizon_steps, num_rows)
        self._turn = 0
        self._open = np.zeros(ring, np.bool_)
        self._layers = np.zeros(ring, np.intp)
        self._experts = np.zeros(ring, np.intp)
        self._rows = np.zeros((*ring, num_features))
        self._predicted = np.zeros(ring)
        self._base_rates = np.zeros(ring)

    @property
    def num_open(self) -> int:
        return int(self._open.sum())

    def answer(self, used: NDArray[np.bool_]) -> Answers:
        """A step has passed that used these experts, [L, E]: settle what it settles.

        True as soon as an expert is used, False when its horizon has passed without.
        """
        self._turn = (self._turn + 1) % len(self._open)
        reused = self._open & used[self._layers, self._experts]
        settled = reused.copy()
        settled[self._turn] = self._open[self._turn]
        self._open &= ~settled
        return Answers(
            self._rows[settled],
            self._predicted[settled],
            self._base_rates[settled],
            reused[settled],
        )

    def ask(self, questions: Questions) -> None:
        """Open questions about the steps after this one. At most once between two answers."""
        turn, size = self._turn, len(questions.layers)
        self._open[turn, :size] = True
        self._layers[turn, :size] = questions.layers
        self._experts[turn, :size] = questions.experts
        self._rows[turn, :size] = questions.rows
        self._predicted[turn, :size] = questions.predicted
        self._base_rates[turn, :size] = questions.base_rate
