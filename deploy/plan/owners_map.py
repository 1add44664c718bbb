"""Which box owns how many experts of each layer, what its memory holds, and what goes twice: by the
rule that a main node goes by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from compute_node.boxes.doubles import LOOK_STEPS, Doubles
from compute_node.boxes.owners import Owners, PlacementName, placed
from proto import errors
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS, HeldExperts


@dataclass(frozen=True)
class Holder:
    """A box, as a main node knows it.

    slots: experts that it holds at once; cost: of one there, over what it costs on the main box
    held:  the experts that its store has
    """

    name: str
    slots: int
    cost: float = 1.0
    held: HeldExperts = ALL_EXPERTS


@dataclass(frozen=True)
class Owned:
    """By one box.

    by_layer: experts that it is the first owner of
    doubled:  of which it can be the second owner besides, once it is known what is used most
    slots:    experts that its memory holds; expert_bytes: of one
    """

    box: str
    by_layer: Sequence[int]
    doubled: int
    slots: int
    expert_bytes: float

    @property
    def experts(self) -> int:
        return sum(self.by_layer)

    @property
    def a_layer(self) -> str:
        """How many of each."""
        fewest, most = min(self.by_layer), max(self.by_layer)
        return f"{fewest}" if fewest == most else f"{fewest} to {most}"

    @property
    def fitting(self) -> int:
        """Of them, that its memory holds at once."""
        return min(self.experts, self.slots)

    def as_document(self) -> dict[str, Any]:
        sums = {"fewest": min(self.by_layer), "most": max(self.by_layer), "experts": self.experts}
        return {**vars(self), **sums, "fitting": self.fitting, "by_layer": list(self.by_layer)}


@dataclass(frozen=True)
class Model:
    """What of it the rule needs. moe_layers: in the order in which they run"""

    moe_layers: Sequence[int]
    num_experts: int
    expert_bytes: float

    def keys(self, layer: int) -> list[ExpertKey]:
        return [ExpertKey(layer, expert) for expert in range(self.num_experts)]


@dataclass(frozen=True)
class OwnersMap:
    """boxes: the main one first; lacking: experts that no box has"""

    boxes: Sequence[Owned]
    lacking: Sequence[ExpertKey]

    @classmethod
    def of(
        cls,
        model: Model,
        holders: Sequence[Holder],
        placement: PlacementName = "shares",
        num_groups: int = 0,
        *,
        doubles: bool = False,
    ) -> OwnersMap:
        """holders: the main one first; num_groups: see `placed`; doubles: some experts may have a
        second owner, where they are placed by shares
        """
        owners = owners_of(model, holders, placement, num_groups)
        firsts = {layer: _firsts(model, layer, owners, holders[0]) for layer in model.moe_layers}
        counts = [Counter(found.values()) for found in firsts.values()]
        seconds = Counter[int]()
        if doubles and placement != "rotation":
            seconds = _seconds(model, owners, [one.slots for one in holders])
        boxes = [
            Owned(
                one.name,
                [found[number] for found in counts],
                seconds[number],
                one.slots,
                model.expert_bytes,
            )
            for number, one in enumerate(holders)
        ]
        lacking = [key for found in firsts.values() for key, box in found.items() if box is None]
        return cls(boxes, lacking)


def owners_of(
    model: Model, holders: Sequence[Holder], placement: PlacementName, num_groups: int
) -> Owners:
    """As the main node makes them."""
    slots, held = [one.slots / one.cost for one in holders], [one.held for one in holders]
    return placed(placement, model.moe_layers, model.num_experts, slots, held, num_groups)


def placement_of(text: str) -> PlacementName:
    """Raises InvalidRequest."""
    if text not in (known := get_args(PlacementName)):
        raise errors.InvalidRequest(f"there is no placement {text!r}: give {' or '.join(known)}")
    return cast(PlacementName, text)


def _firsts(model: Model, layer: int, owners: Owners, main: Holder) -> dict[ExpertKey, int | None]:
    """Number of the first owner of each expert of the layer; None: nobody has it."""
    found: dict[ExpertKey, int | None] = {}
    for key in model.keys(layer):
        able = owners.owners(key)
        found[key] = able[0] if able else 0 if key in main.held else None
    return found


def _seconds(model: Model, owners: Owners, slots: Sequence[float]) -> Counter[int]:
    """Experts by their second owner, where all are used as often."""
    doubles = Doubles(model.moe_layers, model.num_experts, owners, slots)
    for layer in model.moe_layers:
        for _ in range(LOOK_STEPS):
            doubles.note(layer, range(model.num_experts))
    seconds = (doubles.second(key) for layer in model.moe_layers for key in model.keys(layer))
    return Counter(number for number in seconds if number is not None)
