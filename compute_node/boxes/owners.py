"""Which box computes which experts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from proto.expert import ExpertKey


class Owners(Protocol):
    """Of every expert. Pure."""

    def owners(self, key: ExpertKey) -> Sequence[int]:
        """Numbers of the boxes that may compute it, the first that is up does; box 0 is the main
        node, which computes what no other box does.
        """


class Shares:
    """Every expert has one owner: in each layer a box owns as large a share as its slots are of all
    slots. Layers begin with different boxes, so that shares come out even over the model.

    slots: of each box, experts that it holds at once, over what one costs there; box 0 is the main
    node
    """

    def __init__(self, num_experts: int, slots: Sequence[float]) -> None:
        self._num_experts = num_experts
        self._ends = list(accumulate(slots))

    def owners(self, key: ExpertKey) -> Sequence[int]:
        turned = (key.expert + key.layer * (self._num_experts // len(self._ends) or 1)) + 0.5
        place = turned % self._num_experts * self._ends[-1] / self._num_experts
        return (bisect_right(self._ends, place),)


class Rotation:
    """Groups of boxes take layers in turn, so that each has the time of the others' layers to read
    its next layer's experts (OD-MoE, arXiv 2512.03927). In a group each box computes its part of a
    layer, and the others' parts while these are away.

    moe_layers: in the order in which they run; slots: as of `Shares`; the main node's do not count
    num_groups: at most; boxes without slots are in none
    """

    def __init__(self, moe_layers: Sequence[int], slots: Sequence[float], num_groups: int) -> None:
        boxes = [number for number, num in enumerate(slots) if number and num]
        num_groups = min(num_groups, len(boxes)) or 1
        groups = [tuple(boxes[start::num_groups]) for start in range(num_groups)]
        self._group_of = {
            layer: groups[place % num_groups] for place, layer in enumerate(moe_layers)
        }

    def owners(self, key: ExpertKey) -> Sequence[int]:
        group = self._group_of[key.layer]
        first = key.expert % len(group) if group else 0
        return (*group[first:], *group[:first])
