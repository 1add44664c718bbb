"""Planted faults seen red: a second owner where there is no room, the least used doubled, a place
given up for any more use, use that never fades, a box that does not have the expert, the first
owner always chosen, a second owner that is away, doubles of the boxes that there were before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.doubles import Doubles, Use
from compute_node.boxes.owners import Shares
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS, HeldExperts

LAYERS, NUM_EXPERTS = (1, 2), 8


def doubles(*slots: int) -> tuple[Doubles, Shares]:
    """Slots of boxes that own 16 experts together."""
    owners = Shares(NUM_EXPERTS, slots)
    return Doubles(LAYERS, NUM_EXPERTS, owners, slots), owners


def used(found: Doubles, *experts: int, steps: int = 64) -> None:
    for _ in range(steps):
        found.note(1, experts)


def seconds(found: Doubles) -> dict[int, int]:
    boxes = {e: found.second(ExpertKey(1, e)) for e in range(NUM_EXPERTS)}
    return {expert: box for expert, box in boxes.items() if box is not None}


def test_where_memories_hold_no_more_nothing_is_doubled() -> None:
    found, _ = doubles(8, 9)
    used(found, 3, 5)
    assert not seconds(found)


def test_the_most_used_get_a_second_owner_as_far_as_boxes_have_room() -> None:
    found, owners = doubles(12, 12)  # each owns four a layer: two more fit on each
    here, there = ([e for e in range(NUM_EXPERTS) if owner(owners, e) == box] for box in (0, 1))
    used(found, *range(NUM_EXPERTS))
    hot = [*here[:2], *there[:2]]
    used(found, *hot, steps=128)
    assert seconds(found) == {here[0]: 1, here[1]: 1, there[0]: 0, there[1]: 0}
    assert found.num_doubled == 4


def owner(owners: Shares, expert: int) -> int:
    [box] = owners.owners(ExpertKey(1, expert))
    return box


def test_a_place_is_given_up_for_far_more_use_alone() -> None:
    found, owners = doubles(8, 10)
    here = [e for e in range(NUM_EXPERTS) if owner(owners, e) == 0]
    used(found, here[0])
    assert seconds(found) == {here[0]: 1}
    used(found, here[1], steps=64 + 32)
    used(found, here[0], steps=16)
    used(found, here[1], steps=16)
    assert seconds(found) == {here[0]: 1}, "not by far"
    used(found, here[1], steps=128)
    assert seconds(found) == {here[1]: 1}


def test_a_box_that_does_not_have_an_expert_does_not_double_it() -> None:
    every = [ExpertKey(layer, e) for layer in LAYERS for e in range(NUM_EXPERTS)]
    held = [HeldExperts(frozenset(every)), HeldExperts(frozenset(every[:4] + every[8:12]))]
    slots = (16, 16)
    found = Doubles(LAYERS, NUM_EXPERTS, Shares(NUM_EXPERTS, slots, held), slots)
    used(found, *range(NUM_EXPERTS))
    assert all(box == 0 or expert < 4 for expert, box in seconds(found).items())
    assert seconds(found)


@dataclass(eq=False)
class Link:
    slots: int
    is_up: bool = True
    is_joined: bool = True
    cost: float = 1.0
    held: HeldExperts = ALL_EXPERTS

    def move_in(self, layer: int, experts: Sequence[int]) -> None:
        pass


def test_the_less_busy_owner_computes() -> None:
    boxes = Boxes(
        lambda shares, held: Shares(NUM_EXPERTS, shares, held),
        16,
        new_doubles=lambda owners, slots: Doubles(LAYERS, NUM_EXPERTS, owners, slots),
    )
    one, other = Link(16), Link(16)
    boxes.links = [one, other]  # type: ignore[list-item]
    [mine] = [part for link, part in parts(boxes, range(8)).items() if link == id(one)]
    assert parts(boxes, mine) == {id(one): mine}
    for _ in range(64):
        boxes.note(1, range(NUM_EXPERTS))
    assert boxes.num_doubled == NUM_EXPERTS
    assert [len(part) for part in parts(boxes, mine).values()] == [1, 1]
    other.is_up = False
    assert parts(boxes, mine).keys() == {id(one)}
    boxes.links = [one]  # type: ignore[list-item]
    assert boxes.shares(1, mine) and boxes.num_doubled == 0, "measured anew"


def parts(boxes: Boxes, experts: Iterable[int]) -> dict[int, list[int]]:
    return {id(link): part for link, part in boxes.shares(1, experts).items()}


def test_use_fades() -> None:
    use = Use(2)
    for _ in range(256):
        use.note([0])
    for _ in range(256):
        use.note([1])
    assert use.counts == [pytest.approx(64), pytest.approx(128)]
