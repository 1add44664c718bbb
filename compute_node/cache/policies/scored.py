"""Evicts by advice: the scores that the scheduler published, and what the node knows since."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from compute_node.cache.policies.heard import Heard
from proto.correction import corrected
from proto.expert import ExpertKey
from proto.redis_schema import Advice


class Scored:
    """Evicts the lowest score.

    scores: the advice's, [L, E]; rows: model layer number -> row
    heard:  what layers used since advice; None, scores are taken as they are
    """

    def __init__(
        self,
        advice: Advice,
        scores: NDArray[np.float32],
        rows: Mapping[int, int],
        heard: Heard | None = None,
    ) -> None:
        self._advice = advice
        self._scores = scores
        self._rows = rows
        self._heard = heard if advice.unused_scores is not None else None
        self._ranks: dict[int, list[float]] = {}  # of the layers that were asked for

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        """The layer's experts rank anew, if what was heard changes them."""
        if self._heard is not None:
            self._ranks.pop(layer, None)

    def rank(self, key: ExpertKey) -> float:
        ranks = self._ranks.get(key.layer)
        if ranks is None:
            ranks = self._ranks[key.layer] = self._rank_layer(self._rows[key.layer])
        return ranks[key.expert]

    def _rank_layer(self, row: int) -> list[float]:
        unused, heard = self._advice.unused_scores, self._heard
        odds = None if heard is None else heard.odds(row, self._advice.as_of_ns)
        if odds is None or unused is None:
            scores: list[float] = self._scores[row].tolist()
            return scores
        ranks: list[float] = corrected(unused[row], odds).tolist()
        return ranks
