"""What a main node asks of which box in a decode step, once times are known.

Planted faults seen red: what a box holds not believed, an expert of the main node's memory asked of
its owner, a box without a measured read given one, reads chosen where groups take turns, what a box
holds named to its owner, a box that is away asked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field

import pytest

from compute_node.boxes.box_residents import BoxResidents, to_bytes
from compute_node.boxes.boxes import Boxes
from compute_node.boxes.doubles import Doubles
from compute_node.boxes.owners import Shares
from compute_node.boxes.times import Times
from proto import worker_pb2 as pb
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS, HeldExperts

NUM_EXPERTS, LAYER = 8, 1


@dataclass(eq=False)
class Link:
    name: str
    read_s: float = 0.1
    expert_s: float = 0.001
    slots: int = 8
    is_up: bool = True
    is_joined: bool = True
    cost: float = 1.0
    held: HeldExperts = ALL_EXPERTS
    residents: BoxResidents = field(default_factory=BoxResidents)
    times: Times = field(default_factory=Times)
    prepared: list[int] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        self.prepared += experts

    def move_in(self, layer: int, experts: Sequence[int]) -> None:
        self.moved += experts


class Here:
    def __init__(self, held: Collection[int] = (), read_s: float = 0.1) -> None:
        self._held, self._read_s = held, read_s

    def has(self, expert: int) -> bool:
        return expert in self._held

    def read_s(self, expert: int) -> float:
        return self._read_s


def boxes_of(
    *links: Link, here: Set[ExpertKey] | None = frozenset(), doubles: bool = False
) -> Boxes:
    found = Boxes(
        lambda slots, held: Shares(NUM_EXPERTS, slots, held),
        8,
        new_doubles=(lambda owners, slots: Doubles((LAYER,), NUM_EXPERTS, owners, slots))
        if doubles
        else None,
        here=here,
    )
    found.times.computed(0.001, 1)
    for link in links:
        link.times.way(0.001)
    found.links = links  # type: ignore[assignment]
    return found


def chosen(boxes: Boxes, experts: Sequence[int], here: Here) -> dict[str, list[int]]:
    found = boxes.cheapest(LAYER, experts, here)
    return {link.name: part for link, part in found.items()}  # type: ignore[attr-defined]


def owned(boxes: Boxes) -> dict[str, list[int]]:
    found = boxes.shares(LAYER, range(NUM_EXPERTS))
    return {link.name: part for link, part in found.items()}  # type: ignore[attr-defined]


def test_what_a_box_holds_it_computes_whoever_owns_it() -> None:
    one, other = Link("one"), Link("other")
    boxes = boxes_of(one, other)
    owners = owned(boxes)
    one.residents.heard(LAYER, to_bytes({owners["other"][0]}))
    assert chosen(boxes, owners["other"][:1], Here()) == {"one": owners["other"][:1]}
    one.is_up = False
    assert chosen(boxes, owners["other"][:1], Here()) == {"other": owners["other"][:1]}


def test_what_the_main_node_has_in_memory_it_computes() -> None:
    one = Link("one")
    boxes = boxes_of(one)
    theirs = owned(boxes)["one"]
    assert chosen(boxes, theirs[:1], Here(theirs[:1])) == {}


def test_reads_are_shared_out_among_disks() -> None:
    one, other = Link("one"), Link("other")
    boxes = boxes_of(one, other)
    theirs = owned(boxes)["one"]
    assert len(theirs) >= 2
    found = chosen(boxes, theirs[:2], Here(read_s=10.0))
    assert {name: len(part) for name, part in found.items()} == {"one": 1, "other": 1}
    assert chosen(boxes, theirs[:2], Here(read_s=0.02)) == {}, "the own disk is faster by far"


def test_what_is_not_measured_reads_nothing_but_its_own() -> None:
    one, other = Link("one"), Link("other", read_s=0.0)
    boxes = boxes_of(one, other)
    owners = owned(boxes)
    found = chosen(boxes, owners["one"], Here(read_s=100.0))
    assert found == {"one": owners["one"]}
    assert chosen(boxes, owners["other"], Here()) == {"other": owners["other"]}


def test_where_groups_take_turns_the_group_reads() -> None:
    one, other = Link("one"), Link("other")
    boxes = boxes_of(one, other, here=None)
    theirs = owned(boxes)["one"]
    one_key = ExpertKey(LAYER, theirs[0])
    assert chosen(boxes, theirs, Here(theirs)) == {"one": theirs}
    assert boxes.needs_no_read(one_key)


def test_what_is_foreseen_is_named_to_who_holds_it() -> None:
    """Else to its owner; not at all where the main node has it."""
    one, other = Link("one"), Link("other")
    mine = set[ExpertKey]()
    boxes = boxes_of(one, other, here=mine)
    owners = owned(boxes)
    mine.add(ExpertKey(LAYER, owners["one"][0]))
    held, left = owners["other"][0], owners["other"][1]
    one.residents.heard(LAYER, to_bytes([held]))
    boxes.prepare(LAYER, [owners["one"][0], held, left])
    assert (one.prepared, other.prepared) == ([held], [left])
    key = ExpertKey(LAYER, held)
    assert key in boxes and boxes.needs_no_read(key)
    assert not boxes.needs_no_read(ExpertKey(LAYER, left))
    one.is_up = False
    boxes.prepare(LAYER, [held])
    assert held in other.prepared and not boxes.needs_no_read(key)


def test_a_second_owner_reads_in_the_background() -> None:
    """Seen red: nothing is sent; what the main node now owns is sent to a box."""
    one = Link("one", slots=16)
    boxes = boxes_of(one, doubles=True)
    mine = [e for e in range(NUM_EXPERTS) if e not in owned(boxes)["one"]]
    moved = [boxes.note(LAYER, mine) for _ in range(64)]
    assert one.moved and set(one.moved) <= set(mine) and not any(moved)
    one.moved.clear()
    assert [boxes.note(LAYER, mine) for _ in range(64)] == [[]] * 64 and not one.moved, "once"


def test_what_a_reply_says() -> None:
    residents, times = BoxResidents(), Times()
    residents.heard(3, to_bytes({0, 9}))
    assert [e for e in range(20) if residents.has(3, e)] == [0, 9] and not residents.has(4, 9)
    residents.add(3, [1])
    assert len(residents) == 3
    residents.heard(3, b"")
    assert len(residents) == 0
    times.heard(pb.WorkReply(took_us=4000, read_us=50_000), 4)
    assert (times.expert_s, times.read_s) == (pytest.approx(0.001), pytest.approx(0.05))
    times.heard(pb.WorkReply(took_us=400_000, num_read=2), 4)
    assert times.expert_s == pytest.approx(0.001), "it read"
