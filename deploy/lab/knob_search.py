"""Which settings of a route to measure next, so that few measurements find the fastest within a
quality budget, or the truest within a time a token.

The search is a successive refinement. The first round measures a coarse grid: each knob alone at
two strengths, and every two knobs together. From all that is measured so far, a response surface
(Box & Wilson 1951: a polynomial of second degree in the knobs, here with a ridge) is fitted to loss
and to the logarithm of time. Each further round asks the fit for the best of the fine grid's
settings within the limit, and within parts of it, which lie between the best neighbours on the
frontier; it measures them, and fits again. What is written and chosen is always what was measured,
never what was fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.lab.knobs import Knob, Point, coarse_points, fine_points

_RIDGE = 0.01  # of the features' mean square
_LEAST_SHARE = 0.1  # of the median loss: smaller ones weigh no more
_TINY = 1e-9
_PARTS = (1.0, 0.5, 0.2)  # of a limit, each asked for the best setting within it

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What a setting was measured to do. loss: the budget it takes; ms: the mean time a token."""

    loss: float
    ms: float


@dataclass(frozen=True)
class Goal:
    """Either limit may be None, not both. most_loss: find the fastest within this budget; most_ms:
    find the truest within this time a token.
    """

    most_loss: float | None = None
    most_ms: float | None = None

    def best(self, predicted: Mapping[Point, Found], part: float) -> Point | None:
        """Of settings that are predicted to keep to a part of the limit; None: none does."""
        if self.most_loss is not None:
            limit, limited, wanted = self.most_loss * part, _loss, _ms
        else:
            assert self.most_ms is not None
            limit, limited, wanted = self.most_ms * (1 - 0.2 * (1 - part)), _ms, _loss
        within = [point for point, found in predicted.items() if limited(found) <= limit]
        return min(within, key=lambda point: wanted(predicted[point]), default=None)


def _loss(found: Found) -> float:
    return found.loss


def _ms(found: Found) -> float:
    return found.ms


def rounds(
    knobs: tuple[Knob, ...], goal: Goal, measured: Mapping[Point, Found], most: int
) -> Iterator[list[Point]]:
    """Settings to measure, a round at a time. The caller adds what it measured to `measured`, exact
    too, before it asks for the next round. Ends after `most` settings, or when the fit names
    nothing new.
    """
    points = list(coarse_points(knobs))[:most]
    left = most
    while points:
        yield points
        left -= len(points)
        points = _proposals(knobs, goal, measured)[:left]


def _proposals(knobs: tuple[Knob, ...], goal: Goal, measured: Mapping[Point, Found]) -> list[Point]:
    surface = Surface.fit(knobs, measured)
    untried = [point for point in fine_points(knobs) if point not in measured]
    predicted = dict(zip(untried, surface.predict(untried), strict=True)) if untried else {}
    named = (goal.best(predicted, part) for part in _PARTS)
    return list(dict.fromkeys(point for point in named if point is not None))


@dataclass(frozen=True)
class Surface:
    """By how much knobs raise the loss, and the logarithm of the time.

    exact_ms: of exact
    weights:  [features, 2]
    """

    knobs: tuple[Knob, ...]
    exact_ms: float
    weights: Array

    @classmethod
    def fit(cls, knobs: tuple[Knob, ...], measured: Mapping[Point, Found]) -> Surface:
        """Least squares with a ridge; losses by their relative error, as a good setting's is small.
        measured: exact among them
        """
        exact = measured[(0.0,) * len(knobs)]
        points = [point for point in measured if any(point)]
        losses = np.array([measured[point].loss for point in points])
        hastes = np.log([measured[point].ms / exact.ms for point in points])
        features = _features(knobs, points)
        weighed = 1 / np.maximum(losses, _LEAST_SHARE * np.median(losses) + _TINY)
        by_loss = _ridge(features * weighed[:, None], losses * weighed)
        return cls(knobs, exact.ms, np.stack([by_loss, _ridge(features, hastes)], axis=1))

    def predict(self, points: list[Point]) -> list[Found]:
        fitted = _features(self.knobs, points) @ self.weights
        return [
            Found(max(0.0, float(loss)), self.exact_ms * float(np.exp(haste)))
            for loss, haste in fitted
        ]


def _ridge(features: Array, targets: Array) -> Array:
    squares = features.T @ features
    mean = np.trace(squares) / len(squares)
    return np.asarray(
        np.linalg.solve(squares + _RIDGE * mean * np.eye(len(squares)), features.T @ targets)
    )


def _features(knobs: tuple[Knob, ...], points: list[Point]) -> Array:
    """[N, features]: how far each knob is turned, its square, and the product of every two. There
    is no constant: exact costs nothing.
    """
    turned = np.array(
        [[k.position(at) for k, at in zip(knobs, point, strict=True)] for point in points]
    )
    first, second = np.triu_indices(len(knobs))
    return np.hstack([turned, turned[:, first] * turned[:, second]])
