"""Who may read a slot, and who may refill it.

Planted faults seen red: newest release first, generation kept
on refill, an evicted expert still found, a slot reclaimable while one of two leases is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expert_store.store import segment
from expert_store.store.segment import Segment
from expert_store.store.slots import Slot, SlotPool
from proto import shm
from proto.expert import RecordKey
from tests.expert_store.raw_session import counts_add_up

NUM_SLOTS = 4


def key(number: int) -> RecordKey:
    return RecordKey.exact(0, number)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Segment]:
    with segment.create(tmp_path / "segment", NUM_SLOTS, shm.PAGE_BYTES) as created:
        yield created


@pytest.fixture
def slots(shared: Segment) -> SlotPool:
    return SlotPool(shared)


def fill(slots: SlotPool, *numbers: int) -> list[Slot]:
    found = []
    for number in numbers:
        slot = begin(slots)
        slots.seal(slot, key(number))
        found.append(slot)
    return found


def begin(slots: SlotPool) -> Slot:
    slot = slots.next_to_fill()
    assert slot is not None
    slots.fill(slot)
    return slot


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
    assert slots.next_to_fill() is None
    leased = slots.find(key(2))
    assert leased is not None
    slots.release(leased)
    assert slots.next_to_fill() is None
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
    assert shm.read_generation(data, slot.number) == slot.generation == before + 1


class AnySequence(RuleBasedStateMachine):
    """Fills, failures, leases and releases in any order, against a plain account of them."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotPool(FakeSegment())  # type: ignore[arg-type]
        self.leases: list[tuple[RecordKey, Slot, int]] = []

    @rule(number=st.integers(0, 9), fails=st.booleans())
    def fill(self, number: int, fails: bool) -> None:
        if self.slots.find(key(number)):
            return
        slot = self.slots.next_to_fill()
        if slot is None:
            assert len({slot for _, slot, _ in self.leases}) == NUM_SLOTS
            return
        self.slots.fill(slot)
        if fails:
            self.slots.give_back(slot)
            assert self.slots.find(key(number)) is None
        else:
            self.slots.seal(slot, key(number))

    @rule(number=st.integers(0, 9))
    def lease(self, number: int) -> None:
        if slot := self.slots.find(key(number)):
            self.slots.lease(slot)
            self.leases.append((key(number), slot, slot.generation))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.leases) - 1))
        self.slots.release(self.leases.pop(index)[1])

    @invariant()
    def what_is_leased_stays(self) -> None:
        for expert, slot, generation in self.leases:
            assert (slot.key, slot.generation) == (expert, generation)
            assert self.slots.find(expert) is slot

    @invariant()
    def counts(self) -> None:
        counts = self.slots.counts()
        assert sum(counts.values()) == NUM_SLOTS
        assert counts["leased"] == len({slot for _, slot, _ in self.leases})
        assert len(self.slots.resident()) == counts["leased"] + counts["reclaimable"]

    def teardown(self) -> None:
        for _, slot, _ in self.leases:
            self.slots.release(slot)
        assert counts_add_up(self.slots, NUM_SLOTS)


class FakeSegment:
    """Generations alone."""

    def __init__(self) -> None:
        self.layout = shm.SegmentLayout(NUM_SLOTS, shm.PAGE_BYTES)
        self._generations = [0] * NUM_SLOTS

    def bump_generation(self, slot: int) -> int:
        self._generations[slot] += 1
        return self._generations[slot]


AnySequence.TestCase.settings = settings(deadline=None, max_examples=50, stateful_step_count=30)
TestAnySequence = AnySequence.TestCase
