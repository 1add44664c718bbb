"""Who computes what, and who reads what is named.

Planted faults seen red: what others have unknown, or known before they said it; what the main box
has passed over, or what it only reads ahead counted; owners alone in a step, or alone reading; the
way left out, or programs of it; costs left out of computing, or of reads; prompts, or a rotation,
by cost; names to owners alone; what a box was asked to read not counted; no second owners, or such
as read nothing, or give up what the next step does not use; replies, or what is filled, not heard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from compute_node.boxes.doubles import LOOK_STEPS
from compute_node.boxes.owners import PlacementName
from deploy.simulator.assignment import Assignment
from deploy.simulator.box import Box, BoxSpec
from deploy.simulator.decoding import Decoding
from deploy.simulator.geometry import Geometry
from deploy.simulator.setting import CHEAPEST, ROTATION, Link, Setting
from deploy.simulator.wire import Wire

LAYERS, EXPERTS, TOP_K, EXPERT_BYTES = 2, 16, 4, 1e6
GEOMETRY = Geometry("hand", LAYERS, EXPERTS, TOP_K, EXPERT_BYTES, 0.0, 1000)
READ_S, EXPERT_S = 0.010, 0.002
BOX = BoxSpec("box", EXPERTS * LAYERS * EXPERT_BYTES, EXPERT_BYTES / READ_S, 1e6 / EXPERT_S)
NEAR, FAR = Link(0.0, 1e12), Link(0.5, 1e12)
OWN, OTHER = 0, 8  # experts of layer 0: the first of the main box's, and of the other one's
ALL_OWN = np.array([[0, 1, 2, 3], [8, 9, 10, 11]], np.uint16)  # the main box's, by layer


@dataclass
class Two:
    """Boxes that own half of the experts each."""

    link: Link = NEAR
    other: BoxSpec = BOX
    placement: PlacementName = CHEAPEST

    def __post_init__(self) -> None:
        setting = Setting(GEOMETRY, [BOX, self.other], self.link, placement=self.placement)
        self.boxes = [Box.of(spec, EXPERT_BYTES, TOP_K) for spec in setting.boxes]
        self.assignment = Assignment(setting, self.boxes, Wire(self.link, GEOMETRY))

    def use(self, number: int, *experts: int) -> None:
        """A step of layer 0."""
        self.boxes[number].cache.step(0.0, 0, experts)

    def of_step(self, *experts: int) -> dict[int, list[int]]:
        return self.assignment.of_step(0, experts)


def test_an_expert_that_nobody_has_is_its_owners() -> None:
    two = Two()
    assert two.of_step(OWN) == {0: [OWN]}
    assert two.of_step(OTHER) == {1: [OTHER]}
    assert not two.assignment.is_resident(0, OWN)


def test_what_the_main_node_heard_of_is_computed_there() -> None:
    """Though that may be gone since."""
    two = Two()
    two.use(1, OWN)
    assert two.of_step(OWN) == {0: [OWN]}
    two.assignment.hear(1, 0)
    assert two.of_step(OWN) == {1: [OWN]}
    assert two.assignment.is_resident(0, OWN)
    small = Two(other=replace(BOX, memory_bytes=TOP_K * EXPERT_BYTES))
    small.use(1, OTHER)
    small.assignment.hear(1, 0)
    small.boxes[1].cache.step(0.0, 1, range(TOP_K))
    assert small.of_step(OTHER, OTHER + 1) == {1: [OTHER], 0: [OTHER + 1]}


def test_what_the_main_box_has_used_is_computed_there() -> None:
    """And what it reads ahead."""
    two = Two()
    two.boxes[0].cache.prepare(0.0, 0, [OTHER])
    assert two.of_step(OTHER) == {0: [OTHER]}
    two.use(0, OTHER + 1)
    assert two.of_step(OTHER + 1) == {0: [OTHER + 1]}


def test_experts_that_one_owner_lacks_are_read_by_several_disks() -> None:
    """Where the way is no longer than that."""
    assert Two().of_step(OWN, OWN + 1) == {0: [OWN], 1: [OWN + 1]}
    assert Two(FAR).of_step(OWN, OWN + 1) == {0: [OWN, OWN + 1]}
    decoding = Decoding(Setting(GEOMETRY, [BOX, BOX], NEAR, placement=CHEAPEST))
    took_s = 1 / decoding.decode(ALL_OWN[None]).tokens_per_s
    assert took_s == pytest.approx(LAYERS * (2 * READ_S + EXPERT_S), rel=1e-3)
    assert decoding.decode(ALL_OWN[None]).hit_ratio == 1, "and are computed there from then on"


def test_what_boxes_are_filled_with_is_known() -> None:
    decoding = Decoding(Setting(GEOMETRY, [BOX, BOX], NEAR, placement=CHEAPEST))
    decoding.fill()
    assert decoding.decode(ALL_OWN[None, ::-1]).hit_ratio == 1, "all the other box's"


def test_times_of_a_costly_box_count_for_more() -> None:
    """An expert in memory that costs 4 ms more goes elsewhere, and so does a read."""
    costly = replace(BOX, memory_bytes=3 * BOX.memory_bytes, cost=3.0)  # owns as much
    two = Two(other=costly)
    assert two.of_step(OWN, OWN + 1) == {0: [OWN, OWN + 1]}
    for number in (0, 1):
        two.use(number, OWN, OWN + 1, OWN + 2)
    two.assignment.hear(1, 0)
    assert two.of_step(OWN, OWN + 1) == {0: [OWN, OWN + 1]}
    assert two.of_step(OWN, OWN + 1, OWN + 2)[0] == [OWN, OWN + 1, OWN + 2]


def test_prompts_and_rotations_go_by_owners() -> None:
    decoding = Decoding(Setting(GEOMETRY, [BOX, BOX], NEAR, placement=CHEAPEST))
    decoding.prompt(ALL_OWN[None])
    assert [box.disk.num_reads for box in decoding.boxes] == [LAYERS * 4, 0]
    turns = Two(placement=ROTATION)
    turns.use(0, OWN)
    assert turns.of_step(OWN, OTHER) == {1: [OWN, OTHER]}
    assert turns.assignment.of_names(0, [OWN]) == {1: [OWN]}
    assert not turns.assignment.is_resident(0, OWN)


def test_what_is_named_is_read_where_it_will_be_computed() -> None:
    two = Two()
    two.use(0, OTHER)
    two.use(1, OWN)
    two.assignment.hear(1, 0)
    names = [OWN, OWN + 1, OTHER, OTHER + 1, OTHER + 2]
    assert two.assignment.of_names(0, names) == {
        0: [OWN + 1, OTHER],
        1: [OWN, OTHER + 1, OTHER + 2],
    }
    two.assignment.prepare(0.0, 0, names)
    assert two.of_step(OTHER + 1, OTHER + 2) == {1: [OTHER + 1, OTHER + 2]}, "named to it"


def test_a_second_owner_reads_what_is_used_most_and_computes_it() -> None:
    two = Two()
    for _ in range(LOOK_STEPS):
        two.assignment.note(0.0, 0, [OWN, OWN + 1])
    two.use(1, OTHER)
    assert sorted(two.boxes[1].cache.held_in(0)) == [OWN, OWN + 1, OTHER], "for good"
    two.use(0, OWN, OWN + 1)
    assert {len(part) for part in two.of_step(OWN, OWN + 1).values()} == {1}
    decoding = Decoding(Setting(GEOMETRY, [BOX, BOX], NEAR, placement=CHEAPEST))
    decoding.fill()
    ids = np.tile(ALL_OWN, (LOOK_STEPS, 1, 1))
    once_s = 1 / decoding.decode(ids[:-1]).tokens_per_s
    assert once_s == pytest.approx(LAYERS * 4 * EXPERT_S, rel=1e-2)
    decoding.decode(ids[:8])  # while they are read
    twice_s = 1 / decoding.decode(ids[:4]).tokens_per_s
    assert twice_s == pytest.approx(LAYERS * 2 * EXPERT_S, rel=1e-2)


def test_the_way_to_a_box_is_what_work_of_one_expert_takes() -> None:
    link = Link(0.004, 1e6, 0.001, 0.002)
    wire = Wire(link, GEOMETRY)
    assert wire.way_s == pytest.approx(wire.answer(wire.work(0.0), 1))
