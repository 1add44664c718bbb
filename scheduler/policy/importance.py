"""Eviction by importance: decayed gates of all experts, chosen or not, array-wise (SMoE,
"importance-driven expert scheduling", arXiv 2508.18983, which takes the mean over a window).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess
from scheduler.simulate.ranking import Ranks, chosen

_TINY = 1e-30


class Importance:
    """Evicts the smallest sum of gates, where a gate loses half its worth every `half_life_tokens`
    steps.

    The node's twin does the same arithmetic on the same half-precision gates, so both agree to the
    bit.
    """

    def __init__(self, shape: tuple[int, int], half_life_tokens: float = 16.0) -> None:
        self._decay = math.pow(0.5, 1.0 / half_life_tokens)
        self._worth = np.zeros(shape, np.float64)

    def observe(self, event: DecodeAccess) -> None:
        self._worth *= self._decay
        if event.gates is not None:
            self._worth += event.gates
        else:
            self._worth[chosen(event)] += _shares(event.topk_weights)

    def ranks(self) -> Ranks:
        return self._worth.copy()


def _shares(weights: NDArray[np.float16]) -> Ranks:
    """[L, K], of a node that sends the chosen experts' weights alone."""
    weighed = np.maximum(weights.astype(np.float64), 0.0)
    shares: Ranks = weighed / np.maximum(weighed.sum(axis=1, keepdims=True), _TINY)
    return shares
