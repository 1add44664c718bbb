"""What a node's layers used since the scheduler last heard of them, as odds for their experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import numpy as np

from proto.correction import Array, Correction
from proto.expert import ExpertKey


class Heard:
    """Of steps of one token; a step of several says nothing of any.

    top_k: experts that a token uses in a layer
    """

    def __init__(
        self, correction: Correction, top_k: int, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._correction = correction
        self._top_k = top_k
        self._now_ns = now_ns
        num_layers = len(correction.base)
        self._times_ns = [0] * num_layers  # of the last step of each layer; 0, not of one token
        self._used: list[list[int]] = [[] for _ in range(num_layers)]
        self._said: list[Array | None] = [None] * num_layers
        self._odds: list[Array | None] = [None] * num_layers

    def on_step(self, row: int, used: Collection[ExpertKey]) -> None:
        """The layer of this row, in the order of the model, used these experts."""
        before = self._said[row - 1] if row else None
        self._odds[row] = None
        self._times_ns[row] = 0
        self._said[row] = None
        if len(used) != self._top_k or (row and before is None):
            return
        experts = [key.expert for key in used]
        said = np.add.reduce(self._correction.embed[row].take(experts, axis=0))
        self._said[row] = said if before is None else before + said
        self._used[row] = experts
        self._times_ns[row] = self._now_ns()

    def odds(self, row: int, as_of_ns: int) -> Array | None:
        """[E], by what the odds of each expert are multiplied for what its layer used after
        `as_of_ns`; None when that is nothing, or nothing is known of it. Changes only with a step
        of the layer.
        """
        said = self._said[row]
        if said is None or self._times_ns[row] <= as_of_ns:
            return None
        odds = self._odds[row]
        if odds is None:
            odds = self._odds[row] = self._correction.layer_odds(row, self._used[row], said)
        return odds
