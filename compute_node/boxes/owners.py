"""Which box computes which experts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from proto.expert import ExpertKey


class Owners:
    """Every expert has one owner: in each layer a box owns as large a share as its slots are of all
    slots. Layers begin with different boxes, so that shares come out even over the model.

    slots: of each box, experts that it holds at once; box 0 is the main node
    """

    def __init__(self, num_experts: int, slots: Sequence[int]) -> None:
        self._num_experts = num_experts
        self._ends = list(accumulate(slots))

    def owner(self, key: ExpertKey) -> int:
        """The number of the box."""
        turned = (key.expert + key.layer * (self._num_experts // len(self._ends) or 1)) + 0.5
        place = turned % self._num_experts * self._ends[-1] / self._num_experts
        return bisect_right(self._ends, place)
