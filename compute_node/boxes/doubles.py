"""A second owner for the experts that are used most, where boxes have memory for them, so that the
less busy of two computes them.

Why not one owner by measured use: in recorded routing, what is used as often is used together, and
the busiest box of a layer had as much to do as with even shares. With a second owner for a quarter
of the experts it had a quarter less (tests/bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from compute_node.boxes.owners import Owners
from proto.expert import ExpertKey

_HALF_LIFE = 256  # steps of a layer
LOOK_STEPS = 64  # of a layer, between two looks at who is used most
_MOVE_USES = 40.0  # more uses, of some 370 that count, until another expert takes the place of one:
# a second owner spares a step a quarter of an expert, and reads it once for the time of ten


class Use:
    """How often steps used each expert of a layer lately."""

    def __init__(self, num_experts: int) -> None:
        self.counts = [0.0] * num_experts
        self.num_steps = 0

    def note(self, experts: Collection[int]) -> None:
        """A step used these."""
        self.num_steps += 1
        for expert in experts:
            self.counts[expert] += 1.0
        if self.num_steps % _HALF_LIFE == 0:
            self.counts = [count / 2 for count in self.counts]


class Doubles:
    """The second owners, layer by layer. One thread changes them; any may ask.

    owners: the first ones
    slots:  of each box, experts that it holds at once; box 0 is the main node
    """

    def __init__(
        self, moe_layers: Sequence[int], num_experts: int, owners: Owners, slots: Sequence[float]
    ) -> None:
        self._num_experts, self._owners = num_experts, owners
        self._use = {layer: Use(num_experts) for layer in moe_layers}
        self._second: dict[int, Mapping[int, int]] = {}
        self._room = [
            int((num - owned) / len(moe_layers))
            for num, owned in zip(slots, self._num_owned(len(slots)), strict=True)
        ]

    @property
    def num_doubled(self) -> int:
        """Experts that have a second owner."""
        return sum(map(len, self._second.values()))

    def second(self, key: ExpertKey) -> int | None:
        """Its second owner, which has it in its store."""
        return self._second.get(key.layer, {}).get(key.expert)

    def note(self, layer: int, experts: Collection[int]) -> Mapping[int, Sequence[int]]:
        """A decode step used these of `layer`. Moves second owners now and then, where what is
        gained exceeds the read. Returns what each box owns from now on, too, and did not before.
        """
        use = self._use[layer]
        use.note(experts)
        if not any(self._room) or use.num_steps % LOOK_STEPS:
            return {}
        former, found = self._second.get(layer, {}), self._moved(layer, use.counts)
        self._second[layer] = found
        new: dict[int, list[int]] = {}
        for expert, box in found.items():
            if former.get(expert) != box:
                new.setdefault(box, []).append(expert)
        return new

    def _moved(self, layer: int, counts: Sequence[float]) -> Mapping[int, int]:
        """By expert: who has a place keeps it, unless another is used by far more."""
        former, room = self._second.get(layer, {}), list(self._room)
        found: dict[int, int] = {}

        def worth(expert: int) -> float:
            return counts[expert] + _MOVE_USES * (expert in former)

        for expert in sorted(range(self._num_experts), key=worth, reverse=True):
            _, *others = self._able(ExpertKey(layer, expert))
            free = [box for box in others if room[box] > 0]
            if not free or not counts[expert]:
                continue
            box = former.get(expert, -1)
            if box not in free:
                box = max(free, key=room.__getitem__)
            room[box] -= 1
            found[expert] = box
        return found

    def _able(self, key: ExpertKey) -> Sequence[int]:
        """The first owner, then all other boxes that may compute it."""
        first = self._owners.owners(key)[:1]
        return (*first, *(box for box in self._owners.able(key) if box not in first)) or (0,)

    def _num_owned(self, num_boxes: int) -> Sequence[int]:
        owned = [0] * num_boxes
        for layer in self._use:
            for expert in range(self._num_experts):
                for box in self._owners.owners(ExpertKey(layer, expert))[:1]:
                    owned[box] += 1
        return owned
