"""Evicts by advice: the scores that the scheduler published."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from proto.expert import ExpertKey


class Scored:
    """Evicts the lowest score. scores: [L, E]; rows: model layer number -> row."""

    def __init__(self, scores: NDArray[np.float32], rows: Mapping[int, int]) -> None:
        self._scores = scores
        self._rows = rows

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        """Scores come from outside and learn nothing here."""

    def rank(self, key: ExpertKey) -> float:
        return float(self._scores[self._rows[key.layer], key.expert])
