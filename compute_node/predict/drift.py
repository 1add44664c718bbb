"""What a predictor was lately wrong by, expert by expert, is added to what it says next: a text
keeps to its topic, and the layers between move every score by much the same from token to token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compute_node.predict.predictor import Seen

_SMOOTHING = 0.1  # of the running mean: about the last ten tokens

Scores = NDArray[np.float32]


class Way(NamedTuple):
    """Scores that are wrong alike. layer: the one that was seen; has_output: of what its resident
    experts add, too.
    """

    predictor: str
    layer: int
    has_output: bool

    @classmethod
    def of(cls, predictor: str, seen: Seen) -> Way:
        return cls(predictor, seen.layer, seen.output is not None)


@dataclass
class Drift:
    """One node's. One thread. Of each layer by each way: the running mean of the error, [E], and
    what was said of it and is not settled yet, [T, E].
    """

    _errors: dict[tuple[int, Way], Scores] = field(default_factory=dict)
    _said: dict[int, dict[Way, Scores]] = field(default_factory=dict)

    def is_open(self, layer: int) -> bool:
        """Whether something was said of `layer`."""
        return layer in self._said

    def corrected(self, layer: int, way: Way, scores: Tensor) -> Tensor:
        """What a predictor says of `layer`, less its error; kept until the layer is reached.

        scores: [T, E]
        """
        said = self._said.setdefault(layer, {})[way] = scores.float().numpy()
        error = self._errors.get((layer, way))
        return scores if error is None else torch.from_numpy(said + error)

    def settle(self, layer: int, truth: Tensor) -> None:
        """The router of `layer` gave `truth`, [T, E]."""
        for way, said in self._said.pop(layer, {}).items():
            # What a pass that was given up said is settled here, too. Of another batch it cannot be
            # compared; of a batch of the same size it is learned as one error of about ten.
            if said.shape == truth.shape:
                self._learn(layer, way, np.add.reduce(truth.float().numpy() - said) / len(said))

    def _learn(self, layer: int, way: Way, error: Scores) -> None:
        """error: [E], of one token, or the mean of several"""
        if not np.isfinite(np.add.reduce(error)):
            return
        before = self._errors.get((layer, way))
        if before is None:
            before = np.zeros_like(error)
        self._errors[layer, way] = _after(before, error)


def corrected(scores: Scores, truth: Scores) -> Scores:
    """What `Drift` makes of recorded scores of some ways, [T, ..., E], as one step follows another.
    NaN: nothing was said, or the truth is not known.
    """
    error, found = np.zeros_like(scores[0]), np.empty_like(scores)
    for step, (said, true) in enumerate(zip(scores, truth, strict=True)):
        found[step] = said + error
        wrong = true - said
        usable = np.isfinite(wrong).all(axis=-1, keepdims=True)
        error = np.where(usable, _after(error, wrong), error)
    return found


def _after(mean: Scores, error: Scores) -> Scores:
    return mean + _SMOOTHING * (error - mean)
