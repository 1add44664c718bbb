"""Decayed gates of all experts, chosen or not (SMoE, "importance-driven expert scheduling", arXiv
2508.18983, which takes the mean over a window).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from proto.expert import ExpertKey

Gates = NDArray[np.float64]


class Importance:
    """Evicts the smallest sum of gates, where a gate loses half its worth every `half_life_tokens`
    steps.
    """

    def __init__(self, half_life_tokens: float = 16.0) -> None:
        self._decay = math.pow(0.5, 1.0 / half_life_tokens)
        self._worth: dict[int, Gates] = {}  # layer

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        """Nothing: `weigh` says of chosen experts what there is to know."""

    def weigh(self, layer: int, gates: Gates) -> None:
        """[E], each expert's share of the gates in one step of `layer`."""
        worth = self._worth.get(layer)
        self._worth[layer] = gates.copy() if worth is None else worth * self._decay + gates

    def rank(self, key: ExpertKey) -> float:
        worth = self._worth.get(key.layer)
        return 0.0 if worth is None else float(worth[key.expert])
