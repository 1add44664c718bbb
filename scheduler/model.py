"""The online learner: River's scaler and logistic regression, judged before each lesson."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from river import drift, linear_model, optim, preprocessing

from scheduler.labels import Answers

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

LEARNING_RATE = 0.01
BOOST = 4.0  # of the learning rate, after a drift
BOOST_LABELS = 2000
REMEMBERED_ROWS = 1000  # weight that the scaler's moments keep after a drift
LOSS_HALF_LIFE_LABELS = 4000
SMALLEST = 1e-7  # no probability below this, nor above 1 - this, when the loss is taken


@dataclass(frozen=True)
class ModelState:
    """All that outlives a restart. Arrays are [N], in the order of the feature names."""

    weights: Array
    bias: float
    means: Array
    variances: Array
    counts: NDArray[np.int64]
    labels_learned: int
    drifts: int
    log_loss: float
    baseline_log_loss: float
    base_rate: float


@dataclass(frozen=True)
class Contribution:
    name: str
    value: float
    weight: float
    contribution: float


class DecayedMean:
    """Mean of a stream that forgets, true from the first value on."""

    def __init__(self, half_life: float, value: float = 0.0, count: int = 0) -> None:
        self._step = 1 - 0.5 ** (1 / half_life)
        self.value = value
        self._count = count

    def update(self, value: float) -> None:
        self._count += 1
        self.value += (value - self.value) * max(self._step, 1 / self._count)


class ReuseModel:
    """P(an expert is used within the horizon). `learn` changes it; the others only ask."""

    def __init__(self, names: Sequence[str], state: ModelState | None = None) -> None:
        self.names = tuple(names)
        self._scaler = preprocessing.StandardScaler()
        self._regression = linear_model.LogisticRegression(optimizer=optim.SGD(LEARNING_RATE))
        self.pipeline = self._scaler | self._regression
        self._drift = drift.ADWIN()
        self._boosted_labels = 0
        self.labels_learned = 0
        self.drifts = 0
        self._log_loss = DecayedMean(LOSS_HALF_LIFE_LABELS)
        self._baseline_log_loss = DecayedMean(LOSS_HALF_LIFE_LABELS)
        self._base_rate = DecayedMean(LOSS_HALF_LIFE_LABELS, value=0.5)
