"""Which simulated box computes which experts, by the rules of the main node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compute_node.boxes.box_residents import BoxResidents, to_bytes
from compute_node.boxes.choice import Side, Wanted, cheapest
from deploy.simulator.box import Box
from deploy.simulator.setting import CHEAPEST, Setting
from deploy.simulator.wire import Wire
from proto.expert import ExpertKey

Parts = dict[int, list[int]]
"""By number of the box, the experts that it computes, ascending."""


class Assignment:
    """By cost, an expert of a decode step goes where it costs least, by what the main node has
    heard of others' memories. In a prompt, and where groups take layers in turn, it goes to its
    first owner.

    boxes: the main one first
    """

    def __init__(self, setting: Setting, boxes: Sequence[Box], wire: Wire) -> None:
        self._boxes, self._wire = boxes, wire
        self._owners, self._doubles = setting.owners(), setting.doubles()
        self._goes_by_cost = setting.placement == CHEAPEST
        self._heard = {number: BoxResidents() for number in range(1, len(boxes))}
        self._sides = {
            number: Side(wire.way_s if number else 0.0, self._cost(number) * box.expert_s)
            for number, box in enumerate(boxes)
        }

    def owner(self, layer: int, expert: int) -> int:
        return next(iter(self._owners.owners(ExpertKey(layer, expert))), 0)

    def by_owner(self, layer: int, experts: Iterable[int]) -> Parts:
        """experts: ascending"""
        parts: Parts = {}
        for expert in experts:
            parts.setdefault(self.owner(layer, expert), []).append(expert)
        return parts

    def of_step(self, layer: int, experts: Iterable[int]) -> Parts:
        """What each box computes for a decode step. experts: ascending"""
        if not self._goes_by_cost:
            return self.by_owner(layer, experts)
        wanted = [self._wanted(ExpertKey(layer, expert)) for expert in experts]
        found = cheapest(wanted, self._sides, lambda box, _: self._read_s(box))
        return {box: sorted(part) for box, part in found.items()}

    def of_names(self, layer: int, experts: Iterable[int]) -> Parts:
        """Which box reads ahead what is named, or keeps it. experts: ascending"""
        parts: Parts = {}
        for expert in experts:
            box = next(iter(self._holders(ExpertKey(layer, expert))), self.owner(layer, expert))
            parts.setdefault(box, []).append(expert)
        return parts

    def prepare(self, now_s: float, layer: int, experts: Iterable[int]) -> None:
        """A later step of the layer will likely use these, ascending."""
        for number, part in self.of_names(layer, experts).items():
            self._boxes[number].cache.prepare(self._named(now_s, number, layer, part), layer, part)

    def note(self, now_s: float, layer: int, experts: Sequence[int]) -> None:
        """A decode step uses these. Second owners that are new read what they own."""
        moved = self._doubles.note(layer, experts) if self._doubles is not None else {}
        for number, part in moved.items():
            self._boxes[number].cache.move_in(self._named(now_s, number, layer, part), layer, part)

    def hear(self, number: int, layer: int) -> None:
        """A box has answered, and says what it has of the layer."""
        if number and self._goes_by_cost:
            self._heard[number].heard(layer, to_bytes(self._boxes[number].cache.held_in(layer)))

    def is_resident(self, layer: int, expert: int) -> bool:
        """Where it may be computed."""
        key = ExpertKey(layer, expert)
        if self._goes_by_cost:
            return any(key in box.cache for box in self._boxes)
        return key in self._boxes[self.owner(layer, expert)].cache

    def _wanted(self, key: ExpertKey) -> Wanted:
        if holders := self._holders(key):
            return Wanted(key.expert, holders, ())
        owner = self.owner(key.layer, key.expert)
        others = (box for box in self._owners.able(key) if box != owner)
        return Wanted(key.expert, (), (owner, *others))

    def _holders(self, key: ExpertKey) -> list[int]:
        """None where costs do not count. What is being read is held."""
        if not self._goes_by_cost:
            return []
        heard = (box for box, one in self._heard.items() if one.has(key.layer, key.expert))
        return [0, *heard] if key in self._boxes[0].cache else [*heard]

    def _named(self, now_s: float, number: int, layer: int, experts: Sequence[int]) -> float:
        """When the box hears that it is to read these."""
        if not number:
            return now_s
        self._heard[number].add(layer, experts)
        return self._wire.named(now_s)

    def _read_s(self, number: int) -> float:
        return self._cost(number) * self._boxes[number].disk.takes_s

    def _cost(self, number: int) -> float:
        return self._boxes[number].spec.cost if number else 1.0
