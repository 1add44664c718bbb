"""Who may read a slot, and who may refill it.

Planted faults seen red: newest release first, generation kept
on refill, an evicted expert still found, a slot reclaimable while one of two leases is held, a
divided slot taken back while a part of it is lent, free parts of a slot taken back left behind, a
generation kept when a slot is divided anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expert_store.store import segment
from expert_store.store.segment import Segment
from expert_store.store.slots import Part, SlotPool
from proto import shm
from proto.expert import ExpertKey, RecordKey
from tests.expert_store.raw_session import counts_add_up

NUM_SLOTS = 4


def key(number: int) -> RecordKey:
    return RecordKey.exact(0, number)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Segment]:
    with segment.create(
        tmp_path / "segment", shm.SegmentLayout(NUM_SLOTS, 4 * shm.PAGE_BYTES, 4)
    ) as created:
        yield created


@pytest.fixture
def slots(shared: Segment) -> SlotPool:
    return SlotPool(shared)


def fill(slots: SlotPool, *numbers: int) -> list[Part]:
    found = []
    for number in numbers:
        slot = begin(slots)
        slots.seal(slot, key(number))
        found.append(slot)
    return found


def begin(slots: SlotPool, num_parts: int = 1) -> Part:
    taken = slots.fill(num_parts)
    assert taken is not None
    return taken[0]


def test_a_slot_given_back_is_free(slots: SlotPool) -> None:
    for _ in range(3 * NUM_SLOTS):
        slot = begin(slots)
        assert slots.counts()["filling"] == 1
        slots.give_back(slot)
    assert slots.counts() == {"free": NUM_SLOTS, "filling": 0, "leased": 0, "reclaimable": 0}
    assert slots.resident() == []


def test_an_expert_is_found_only_when_it_is_whole(slots: SlotPool) -> None:
    slot = begin(slots)
    assert slots.find(key(1)) is None
    slots.seal(slot, key(1))
    assert slots.find(key(1)) is slot


def test_the_oldest_release_goes_first(slots: SlotPool) -> None:
    filled = fill(slots, 0, 1, 2, 3)
    for slot in filled:
        slots.lease(slot)
    for number in (2, 0, 3, 1):
        slots.release(filled[number])
    for number, gone in enumerate((2, 0, 3), start=10):
        fill(slots, number)
        assert slots.find(key(gone)) is None
    assert slots.resident() == [key(1), key(10), key(11), key(12)]


def test_a_lease_renews_an_experts_stay(slots: SlotPool) -> None:
    filled = fill(slots, 0, 1, 2, 3)
    slots.lease(filled[0])
    slots.release(filled[0])
    fill(slots, 4)
    assert slots.find(key(0)) is filled[0]
    assert slots.find(key(1)) is None


def test_a_leased_slot_is_not_refilled(slots: SlotPool) -> None:
    for slot in fill(slots, 0, 1, 2, 3):
        slots.lease(slot)
        slots.lease(slot)
    assert slots.fill(1) is None
    leased = slots.find(key(2))
    assert leased is not None
    slots.release(leased)
    assert slots.fill(1) is None
    slots.release(leased)
    assert fill(slots, 9) == [leased]


def test_a_refill_changes_the_generation_before_the_bytes(
    slots: SlotPool, shared: Segment, tmp_path: Path
) -> None:
    """As a node sees it, in the file."""
    first = fill(slots, 0, 1, 2, 3)[0]
    before = first.generation
    slot = begin(slots)
    assert slot is first
    data = memoryview((tmp_path / "segment").read_bytes())
    found = shm.read_generation(data, shared.layout, slot.slot.number, 0)
    assert found == slot.generation == before + 1


# Of 400 steps, as it was before slots could be divided.
GOLDEN_SLOTS = (
    "0122230000123302213011233231023102132103211002103210110231023312"
    "2331112301233120312003110332213321032000133322013222201301230030"
    "2102103210321032103210230122330130013221320130133001233013220321"
    "0311031203120"
)


def test_records_of_one_size_fill_the_slots_that_they_always_filled() -> None:
    """Red with the newest release first, with free slots last, with a failed fill's slot last."""
    slots, random, leases = SlotPool(FakeSegment()), Random(7), list[Part]()  # type: ignore[arg-type]
    numbers = []
    for _ in range(400):
        wanted, chance = key(random.randrange(10)), random.random()
        found = slots.find(wanted)
        if chance < 0.3 and found:
            slots.lease(found)
            leases.append(found)
        elif chance < 0.6 and leases:
            slots.release(leases.pop(random.randrange(len(leases))))
        elif not found:
            taken = slots.fill(1)
            assert taken is not None
            numbers.append(str(taken[0].slot.number))
            if random.random() < 0.2:
                slots.give_back(taken[0])
            else:
                slots.seal(taken[0], wanted)
    assert "".join(numbers) == GOLDEN_SLOTS
    assert slots.resident() == [key(number) for number in (2, 9, 7, 1)]


def test_a_divided_slot_is_filled_up_before_another(slots: SlotPool) -> None:
    parts = [begin(slots, 4) for _ in range(5)]
    assert [(part.slot.number, part.number) for part in parts] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
    ]
    for part in parts[:4]:
        slots.give_back(part)
    assert slots.counts()["free"] == NUM_SLOTS - 1, "a slot without records is whole again"


def test_parts_of_slots_in_use_go_first(slots: SlotPool) -> None:
    """So that leases of a few small records do not stand in many slots."""
    first, second, third = (begin(slots, 2) for _ in range(3))
    for number, part in enumerate((first, second, third)):
        slots.seal(part, key(number))
    slots.lease(second)
    slots.lease(third)
    beside_second = begin(slots, 2)
    assert beside_second.slot is third.slot, "a free part of a slot in use"
    assert begin(slots, 2) is first, "a record that nobody uses, though slots are free"
    assert slots.find(key(0)) is None
    assert begin(slots, 2).slot not in (second.slot, third.slot)


def test_the_longest_unused_goes_whatever_its_size(slots: SlotPool) -> None:
    """A part for its like; a whole slot once none of its parts is used, and not before."""
    small = [begin(slots, 2) for _ in range(4)]
    for number, part in enumerate(small):
        slots.seal(part, key(number))
    fill(slots, 10, 11)
    slots.lease(small[1])
    assert begin(slots, 2) is small[0], "released first"
    assert begin(slots).slot is small[2].slot, "small[0] is older, its slot in use"
    assert begin(slots).slot.number == 2


def test_what_a_session_wishes_for_goes_last(slots: SlotPool) -> None:
    """Red with wishes left out of the order, with a wish that outlives the lease."""
    first, second, third, fourth = fill(slots, 0, 1, 2, 3)
    slots.wish(first, "a")
    slots.wish(second, "a")
    slots.wish(second, "b")
    assert begin(slots) is third
    slots.take_back(second, "a")
    assert begin(slots) is fourth, "the other still wishes for it"
    slots.lease(second)
    slots.release(second)
    assert slots.wished_by("b") == [] and slots.wished_by("a") == [first]
    assert begin(slots) is second, "it was had: the wish is over"
    assert begin(slots) is first, "there is no other"


def test_what_nobody_wishes_for_any_more_goes_first(slots: SlotPool) -> None:
    """Red when it keeps the age that it had."""
    *_, latest = fill(slots, 0, 1, 2, 3)
    slots.wish(latest, "a")
    slots.take_back(latest, "a")
    assert begin(slots) is latest


class AnySequence(RuleBasedStateMachine):
    """Fills, failures, wishes, leases and releases of records of three sizes in any order, against
    a plain account of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segment = FakeSegment()
        self.slots = SlotPool(self.segment)  # type: ignore[arg-type]
        self.leases: list[tuple[RecordKey, Part, Place, int]] = []
        self.past: list[tuple[Place, tuple[int, int], int]] = []

    @rule(number=st.integers(0, 40), fails=st.booleans())
    def fill(self, number: int, fails: bool) -> None:
        if self.slots.find(sized_key(number)):
            return
        num_parts = SIZES[number % len(SIZES)]
        taken = self.slots.fill(num_parts)
        if taken is None:
            self.check_nothing_fits(num_parts)
            return
        part, _ = taken
        assert len(part.slot.parts) == num_parts
        assert all(not place(part) & lent for _, _, lent, _ in self.leases), (
            "lent bytes are refilled"
        )
        for where, cell, generation in self.past:
            assert not where & place(part) or self.segment.generations[cell] != generation
        if fails:
            self.slots.give_back(part)
            assert self.slots.find(sized_key(number)) is None
        else:
            self.slots.seal(part, sized_key(number))

    def check_nothing_fits(self, num_parts: int) -> None:
        """Something is lent in every slot, and every part of those that are divided so."""
        lent = {part.slot for _, part, _, _ in self.leases}
        assert len(lent) == NUM_SLOTS
        for slot in lent:
            if len(slot.parts) == num_parts:
                assert {part for _, part, _, _ in self.leases} >= set(slot.parts)

    @rule(number=st.integers(0, 40))
    def lease(self, number: int) -> None:
        if part := self.slots.find(sized_key(number)):
            self.slots.lease(part)
            self.leases.append((sized_key(number), part, place(part), part.generation))

    @rule(number=st.integers(0, 40), wisher=st.integers(0, 1), back=st.booleans())
    def wish(self, number: int, wisher: int, back: bool) -> None:
        if part := self.slots.find(sized_key(number)):
            (self.slots.take_back if back else self.slots.wish)(part, wisher)
            is_leased = part.key in self.slots.leased()
            assert (part in self.slots.wished_by(wisher)) == (not back and not is_leased)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.leases) - 1))
        _, part, where, generation = self.leases.pop(index)
        self.past.append((where, (part.slot.number, part.number), generation))
        self.slots.release(part)

    @invariant()
    def what_is_leased_stays(self) -> None:
        for expert, part, where, generation in self.leases:
            assert (part.key, place(part)) == (expert, where)
            assert self.segment.generations[part.slot.number, part.number] == generation
            assert self.slots.find(expert) is part

    @invariant()
    def no_two_records_overlap(self) -> None:
        found = [self.slots.find(expert) for expert in self.slots.resident()]
        pages = [page for part in found if part for page in place(part)]
        assert len(pages) == len(set(pages)) <= NUM_SLOTS * SLOT_PAGES

    @invariant()
    def counts(self) -> None:
        counts = self.slots.counts()
        assert sum(counts.values()) == NUM_SLOTS
        assert counts["leased"] == len({part.slot for _, part, _, _ in self.leases})
        assert set(self.slots.leased()) == {expert for expert, _, _, _ in self.leases}

    def teardown(self) -> None:
        for _, part, _, _ in self.leases:
            self.slots.release(part)
        for wisher in range(2):
            for part in self.slots.wished_by(wisher):
                self.slots.take_back(part, wisher)
        assert counts_add_up(self.slots, NUM_SLOTS)
        for number in range(NUM_SLOTS):
            self.slots.seal(begin(self.slots), key(number))
        assert self.slots.resident() == [key(number) for number in range(NUM_SLOTS)], "taken back"


SLOT_PAGES = 9
SIZES = (1, 2, 4)  # records a slot
Place = frozenset[int]


def sized_key(number: int) -> RecordKey:
    return RecordKey(ExpertKey(0, 100 + number), ("exact", "int8", "int4")[number % len(SIZES)])


def place(part: Part) -> Place:
    """The pages of the segment that a part takes."""
    slot, start_bytes, length_bytes = part.place
    start = slot * SLOT_PAGES + start_bytes // shm.PAGE_BYTES
    pages = length_bytes // shm.PAGE_BYTES
    return frozenset(range(start, start + pages))


class FakeSegment:
    """Generations alone."""

    def __init__(self) -> None:
        self.layout = shm.SegmentLayout(NUM_SLOTS, SLOT_PAGES * shm.PAGE_BYTES, max(SIZES))
        self.generations = Counter[tuple[int, int]]()

    def bump_generation(self, slot: int, part: int) -> int:
        self.generations[slot, part] += 1
        return self.generations[slot, part]


AnySequence.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=60)
TestAnySequence = AnySequence.TestCase
