"""Which box computes which experts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, Protocol

from proto.expert import ExpertKey
from proto.held_experts import HeldExperts

PlacementName = Literal["shares", "cheapest", "rotation"]


class Owners(Protocol):
    """Of every expert. Pure."""

    def owners(self, key: ExpertKey) -> Sequence[int]:
        """Numbers of the boxes that may compute it, the first that is up does; box 0 is the main
        node, which computes what no other box does, if its store has it. Each has the expert.
        """

    def able(self, key: ExpertKey) -> Sequence[int]:
        """Every box that could compute it: it has slots, and its store has the expert."""


class Shares:
    """Every expert has one owner among the boxes that have it: in each layer a box owns as large a
    share as its slots are of all slots, as far as it has experts. Layers begin with different
    boxes, so that shares come out even over the model. Where the main node cannot stand in for the
    owner, the other boxes that have the expert do.

    slots: of each box, experts that it holds at once, over what one costs there; box 0 is the main
    node
    held:  of each box, the experts that its store has; empty: all have all
    """

    def __init__(
        self,
        num_experts: int,
        slots: Sequence[float],
        held: Sequence[HeldExperts] = (),
    ) -> None:
        self._num_experts, self._slots, self._held = num_experts, slots, held
        self._in_layer: dict[int, Sequence[Sequence[int]]] = {}

    def able(self, key: ExpertKey) -> Sequence[int]:
        boxes = range(len(self._slots))
        return [box for box in boxes if self._slots[box] and self._has(box, key.layer, key.expert)]

    def owners(self, key: ExpertKey) -> Sequence[int]:
        found = self._in_layer.get(key.layer)
        if found is None:
            found = self._in_layer[key.layer] = self._place(key.layer)
        return found[key.expert]

    def _place(self, layer: int) -> Sequence[Sequence[int]]:
        """By expert. A box that has few experts takes more of each."""
        able = [
            tuple(box for box, num in enumerate(self._slots) if num and self._has(box, layer, e))
            for e in range(self._num_experts)
        ]
        weights = [
            num / max(1, sum(box in boxes for boxes in able)) for box, num in enumerate(self._slots)
        ]
        found: list[Sequence[int]] = [()] * self._num_experts
        for boxes in dict.fromkeys(able):
            experts = [expert for expert, able_boxes in enumerate(able) if able_boxes == boxes]
            ends = list(accumulate(weights[box] for box in boxes))
            turn = layer * (len(experts) // max(1, len(boxes)) or 1)
            for place, expert in enumerate(experts if boxes else ()):
                at = ((place + turn) % len(experts) + 0.5) * ends[-1] / len(experts)
                first = bisect_right(ends, at)
                stand_ins = () if 0 in boxes else (*boxes[first + 1 :], *boxes[:first])
                found[expert] = (boxes[first], *stand_ins)
        return found

    def _has(self, box: int, layer: int, expert: int) -> bool:
        return not self._held or ExpertKey(layer, expert) in self._held[box]


class Rotation:
    """Groups of boxes take layers in turn, so that each has the time of the others' layers to read
    its next layer's experts (OD-MoE, arXiv 2512.03927). In a group each box computes its part of a
    layer, and the others' parts while these are away. Boxes that do not have an expert are passed
    over; boxes of other groups compute what neither the group nor the main node has.

    moe_layers: in the order in which they run
    slots, held: as of `Shares`; the main node's slots do not count
    num_groups: at most; boxes without slots are in none
    """

    def __init__(
        self,
        moe_layers: Sequence[int],
        slots: Sequence[float],
        num_groups: int,
        held: Sequence[HeldExperts] = (),
    ) -> None:
        self._held = held
        self._boxes = boxes = [number for number, num in enumerate(slots) if number and num]
        num_groups = min(num_groups, len(boxes)) or 1
        groups = [tuple(boxes[start::num_groups]) for start in range(num_groups)]
        self._group_of = {
            layer: groups[place % num_groups] for place, layer in enumerate(moe_layers)
        }

    def able(self, key: ExpertKey) -> Sequence[int]:
        return [box for box in self._boxes if not self._held or key in self._held[box]]

    def owners(self, key: ExpertKey) -> Sequence[int]:
        group = self._group_of[key.layer]
        first = key.expert % len(group) if group else 0
        order = (*group[first:], *group[:first])
        if not self._held:
            return order
        if key not in self._held[0]:
            order = (*order, *(box for box in self._boxes if box not in group))
        return tuple(box for box in order if key in self._held[box])


def placed(
    placement: PlacementName,
    moe_layers: Sequence[int],
    num_experts: int,
    slots: Sequence[float],
    held: Sequence[HeldExperts] = (),
    num_groups: int = 0,
) -> Owners:
    """By a main node's settings. num_groups: 0: each box but the main one is a group; the rest as
    of `Shares` and `Rotation`
    """
    if placement == "rotation":
        return Rotation(moe_layers, slots, num_groups or len(slots) - 1, held)
    return Shares(num_experts, slots, held)
