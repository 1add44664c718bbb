"""The online learner: River's scaler and logistic regression, judged before each lesson."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river import optim

from proto.stats import counter, gauge
from scheduler.learn.labels import Answers
from scheduler.learn.river_parts import ADWIN, LogisticRegression, StandardScaler

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

LEARNING_RATE = 0.003
BOOSTED_LEARNING_RATE = 0.012  # after a drift
BOOST_LABELS = 2000
REMEMBERED_ROWS = 1000  # weight that the scaler's moments keep after a drift
JUDGED_LABELS = 4000  # half-life of the losses and of the base rate
PRIOR_LABELS = 500  # of base rate 1/2: the first answers of all are "yes", "no" takes a horizon
SURE = 1e-7  # no probability below this, nor above 1 - this, when a loss is taken


@dataclass(frozen=True)
class ModelState:
    """All that outlives a restart. Arrays are [N], in the order of `names`."""

    names: tuple[str, ...]
    weights: Array
    means: Array
    variances: Array
    counts: NDArray[np.int64]
    bias: float
    labels_learned: int
    drifts: int
    log_loss: float
    baseline_log_loss: float
    base_rate: float


@dataclass(frozen=True)
class Contribution:
    """What one feature adds to the log odds; `weight` is that of the scaled feature."""

    name: str
    value: float
    weight: float
    contribution: float


class ReuseModel:
    """P(an expert is used within the horizon). `learn` and `restore` change it, the others ask."""

    labels_learned: int = counter("flashmoe_scheduler_labels_learned", "labels learned")
    drifts: int = counter("flashmoe_scheduler_drifts", "drifts")
    log_loss: float = gauge(
        "flashmoe_scheduler_log_loss", "progressive validation, decayed", start=0.0
    )
    baseline_log_loss: float = gauge(
        "flashmoe_scheduler_baseline_log_loss", "of always predicting the mean, decayed", start=0.0
    )

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._scaler = StandardScaler()
        self._regression = LogisticRegression(
            optimizer=optim.SGD(LEARNING_RATE), intercept_lr=LEARNING_RATE
        )
        self.pipeline = self._scaler | self._regression
        self._drift = ADWIN()
        self._boosted_labels = 0
        self.base_rate = 0.5

    def predict(self, features: Array) -> Array:
        """P(reuse), [...], for features [N, ...]. Equal to the pipeline's predict_proba_one."""
        weights, bias = self._folded()
        # einsum stays in this thread; a BLAS product of this size would wake others.
        logits = np.einsum("n,n...->...", weights, features) + bias
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))))

    def explain(self, row: Sequence[float]) -> list[Contribution]:
        """The terms of one expert's log odds; with `bias` they add up to the score's."""
        scaled = self._scaler.transform_one(dict(zip(self.names, row, strict=True)))
        weights = self._regression.weights
        return [
            Contribution(name, value, weights.get(name, 0.0), weights.get(name, 0.0) * scaled[name])
            for name, value in zip(self.names, row, strict=True)
        ]

    @property
    def bias(self) -> float:
        return float(self._regression.intercept)

    def learn(self, answers: Answers) -> None:
        """Judge what was predicted when the questions were asked, then learn from each answer."""
        losses = []
        for row, reused, predicted, base_rate in zip(
            answers.rows.tolist(),
            answers.reused.tolist(),
            answers.predicted.tolist(),
            answers.base_rates.tolist(),
            strict=True,
        ):
            losses.append(self._judge(reused, predicted, base_rate))
            self.pipeline.learn_one(dict(zip(self.names, row, strict=True)), reused)
        if losses:
            self._watch_for_drift(losses)

    def state(self) -> ModelState:
        weights, scaler = self._regression.weights, self._scaler
        return ModelState(
            names=self.names,
            weights=np.array([weights.get(name, 0.0) for name in self.names], np.float64),
            means=np.array([scaler.means.get(name, 0.0) for name in self.names], np.float64),
            variances=np.array([scaler.vars.get(name, 0.0) for name in self.names], np.float64),
            counts=np.array([scaler.counts.get(name, 0) for name in self.names], np.int64),
            bias=self.bias,
            labels_learned=self.labels_learned,
            drifts=self.drifts,
            log_loss=self.log_loss,
            baseline_log_loss=self.baseline_log_loss,
            base_rate=self.base_rate,
        )

    def restore(self, state: ModelState) -> None:
        """Go on from there. The drift detector starts empty."""
        self._regression.intercept = state.bias
        # River offers no public way to set weights.
        self._regression._weights.update(_by_name(self.names, state.weights))
        self._scaler.counts.update(_by_name(self.names, state.counts))
        self._scaler.means.update(_by_name(self.names, state.means))
        self._scaler.vars.update(_by_name(self.names, state.variances))
        self.labels_learned = state.labels_learned
        self.drifts = state.drifts
        self.log_loss = state.log_loss
        self.baseline_log_loss = state.baseline_log_loss
        self.base_rate = state.base_rate

    def _folded(self) -> tuple[Array, float]:
        """Weights [N] and bias for unscaled features: the scaler is linear too."""
        state = self.state()
        std = np.sqrt(state.variances)
        weights = np.divide(state.weights, std, out=np.zeros_like(std), where=std > 0)
        return weights, state.bias - float(weights @ state.means)

    def _judge(self, reused: bool, predicted: float, base_rate: float) -> float:
        """Test before train; returns the loss of what was predicted."""
        self.labels_learned += 1
        step = max(1 - 0.5 ** (1 / JUDGED_LABELS), 1 / self.labels_learned)
        loss = _log_loss(reused, predicted)
        self.log_loss += step * (loss - self.log_loss)
        self.baseline_log_loss += step * (_log_loss(reused, base_rate) - self.baseline_log_loss)
        self.base_rate += min(step, 1 / PRIOR_LABELS) * (reused - self.base_rate)
        return loss

    def _watch_for_drift(self, losses: Sequence[float]) -> None:
        """One value a step: the labels of a step are too alike for the detector's test."""
        self._calm_down(len(losses))
        before = self._drift.estimation
        self._drift.update(sum(losses) / len(losses))
        if self._drift.drift_detected and self._drift.estimation > before:
            self._on_drift()

    def _calm_down(self, num_labels: int) -> None:
        if 0 < self._boosted_labels <= num_labels:
            self._set_learning_rate(LEARNING_RATE)
        self._boosted_labels = max(0, self._boosted_labels - num_labels)

    def _on_drift(self) -> None:
        """The world moved: learn faster for a while, let the scaler's moments follow."""
        self.drifts += 1
        self._boosted_labels = BOOST_LABELS
        self._set_learning_rate(BOOSTED_LEARNING_RATE)
        for name, count in self._scaler.counts.items():
            self._scaler.counts[name] = min(count, REMEMBERED_ROWS)
        logger.info("drift", extra={"drifts": self.drifts, "labels_learned": self.labels_learned})

    def _set_learning_rate(self, rate: float) -> None:
        self._regression.optimizer.lr = optim.schedulers.Constant(rate)
        self._regression.intercept_lr = optim.schedulers.Constant(rate)


def _by_name(names: Sequence[str], values: NDArray[Any]) -> dict[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))


def _log_loss(reused: bool, probability: float) -> float:
    return -math.log(max(SURE, probability if reused else 1 - probability))
