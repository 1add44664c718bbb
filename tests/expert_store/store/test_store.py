"""Lending: one read for all, damage kept apart, guesses that stand back, slots that come back.

Planted faults seen red: a read for every waiter, no quarantine, what is withdrawn and wanted again
not revived, another session's guess withdrawn, a prefetch somebody waits for not moved up, priority
ignored, guesses read in the order of their messages, a refill into spare slots, no read depth, a
reader that dies, waiters not told at stop, a slot not given back by a failed read, a quota that a
refused read still counts against, a piece taken for whole that came in part, a device that is idle
while a piece is hashed, a stop that does not wait, guesses asked for before their message's
demands, a guess given up that is lent, a demand that waits for a slot for ever, every error taken
for damage.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from expert_store.face.exchange import perform
from expert_store.io.device import Device, ThreadReads
from expert_store.io.files import SourceFiles
from expert_store.io.kernel_queue import KernelQueue
from expert_store.manifest.manifest import Manifest
from expert_store.store import readers as module
from expert_store.store import segment
from expert_store.store.fill import PieceRead
from expert_store.store.readers import Readers
from expert_store.store.sessions import Session, SessionTable
from expert_store.store.slots import SlotPool
from expert_store.store.store import ExpertStore
from expert_store.store.verified_read import add_piece, open_files
from proto import errors, shm
from proto import expert_store_pb2 as pb
from proto.expert import ExpertKey, RecordKey
from proto.stats import Stats
from tests.expert_store.raw_session import DEADLINE_S, counts_add_up, until
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    LAYERS,
    PAYLOAD_BYTES,
    SMALL,
    SMALL_BYTES,
    expert_bytes,
    expert_range,
    flip,
    small_keys,
    with_small_variant,
)

NUM_SLOTS = 8
WHOLE = 1 << 20


@dataclass
class Disk:
    """A real device, that can be held up; lists what it was asked for in order.

    brings_bytes: of each piece, at most
    """

    kind: Callable[[SourceFiles, int], AbstractContextManager[Device[PieceRead]]]
    brings_bytes: int = WHOLE
    order: list[RecordKey] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    most: int = 0
    device: Device[PieceRead] = field(init=False)
    _num_asked: int = 0
    _num_came: int = 0

    @property
    def num_readers(self) -> int:
        return self.device.num_readers

    def submit(self, issued: Sequence[PieceRead]) -> None:
        self.order += [item.fill.record.key for item in issued]
        self._num_asked += len(issued)
        self.most = max(self.most, self._num_asked - self._num_came)
        self.device.submit(issued)

    def wait(self) -> tuple[PieceRead, int] | None:
        came = self.device.wait()
        if came is None:
            return None
        assert self.gate.wait(DEADLINE_S)
        self._num_came += 1
        return came[0], self._cut(*came)

    def _cut(self, read: PieceRead, came_bytes: int) -> int:
        kept = min(came_bytes, self.brings_bytes)
        start, end = read.start_bytes + kept, read.start_bytes + read.length_bytes
        read.memory[start:end] = bytes(end - start)
        return kept

    def stop(self) -> None:
        self.device.stop()

    @contextmanager
    def opened(self, files: SourceFiles, read_depth: int) -> Iterator[Disk]:
        with self.kind(files, read_depth) as self.device:
            yield self


def thread_reads(files: SourceFiles, depth: int) -> AbstractContextManager[Device[PieceRead]]:
    return nullcontext(ThreadReads(depth))


def kernel_queue(files: SourceFiles, depth: int) -> AbstractContextManager[Device[PieceRead]]:
    return closing(KernelQueue(files, depth))


@pytest.fixture(params=[thread_reads, kernel_queue])
def disk(request: pytest.FixtureRequest) -> Disk:
    disk = Disk(request.param)
    disk.gate.set()
    return disk


@contextmanager
def a_store(
    folder: Path,
    disk: Disk,
    read_depth: int = 2,
    max_queued: int = 16,
    num_slots: int = NUM_SLOTS,
    piece_bytes: int = WHOLE,
) -> Iterator[ExpertStore]:
    """Idle again at the end, or it fails."""
    manifest = Manifest.load(folder)
    size_classes = manifest.size_classes
    with (
        segment.create(folder / "segment", size_classes.segment_layout(num_slots)) as shared,
        open_files(manifest, folder, True) as files,
        disk.opened(files, read_depth) as device,
    ):
        slots, lock = SlotPool(shared), threading.RLock()
        sessions = SessionTable(
            slots,
            lock,
            (num_slots - read_depth) * manifest.slot_bytes,
            size_classes.lease_bytes,
            folder / "sessions",
            0.01,
        )
        limits = (read_depth, max_queued, piece_bytes)
        store = ExpertStore(manifest, shared, slots, sessions, lock, *limits, True, device)
        with Readers(store, files):
            yield store
            until(lambda: store.is_idle)
            for session in list(sessions._open):
                counted = sum(sessions.lease_bytes[key.variant] for key in session.leases)
                assert session.held_bytes == counted
                sessions.close(session)
            assert counts_add_up(slots, num_slots), slots.counts()


class Lent(NamedTuple):
    """What a lease says."""

    key: RecordKey
    slot: int
    part: int
    start_bytes: int
    generation: int
    tensor_offsets: list[int]
    bytes_read: int
    error: errors.FlashMoEError | None


def read_lease(lease: pb.Lease) -> Lent:
    error = errors.from_kind(lease.error.kind, lease.error.message)
    return Lent(
        RecordKey.from_pb(lease.key),
        lease.slot,
        lease.part,
        lease.start_bytes,
        lease.generation,
        list(lease.tensor_offsets),
        lease.bytes_read,
        error if lease.HasField("error") else None,
    )


class Borrower:
    """A session, and what came for it."""

    def __init__(self, store: ExpertStore, quota_slots: int = 3) -> None:
        self.store = store
        quota_bytes = quota_slots * store.segment.layout.slot_bytes
        self.session: Session = store.sessions.open("node", quota_bytes, None)
        self.came: dict[RecordKey, Lent] = {}

    def ask(self, *keys: RecordKey) -> None:
        self.store.acquire(self.session, keys, self.take)

    def take(self, leases: list[pb.Lease]) -> None:
        self.came.update({item.key: item for item in map(read_lease, leases)})

    def get(self, *keys: RecordKey) -> list[Lent]:
        for key in keys:
            self.came.pop(key, None)
        self.ask(*keys)
        return self.wait(*keys)

    def wait(self, *keys: RecordKey) -> list[Lent]:
        until(lambda: all(key in self.came for key in keys))
        return [self.came[key] for key in keys]

    def content(self, key: RecordKey) -> bytes:
        """What a node finds in the segment."""
        lent, segment = self.came[key], self.store.segment
        data = memoryview(segment.path.read_bytes())
        found = shm.read_generation(data, segment.layout, lent.slot, lent.part)
        assert found == lent.generation
        start = segment.layout.slot_offset_bytes(lent.slot) + lent.start_bytes
        return bytes(data[start + lent.tensor_offsets[0] :][:PAYLOAD_BYTES])


@pytest.mark.parametrize("piece_bytes", [4096, 8192, WHOLE])
def test_experts_come_whole_however_they_are_cut(
    piece_bytes: int, store_dir: Path, disk: Disk
) -> None:
    with a_store(store_dir, disk, piece_bytes=piece_bytes) as store:
        borrower = Borrower(store)
        lent = borrower.get(*KEYS[:3])
        assert all(borrower.content(key) == expert_bytes(store_dir, key) for key in KEYS[:3])
        assert [item.bytes_read for item in lent] == [PAYLOAD_BYTES] * 3
        assert (store.counters.demand_reads, store.counters.shared_hits) == (3, 0)
        assert store.counters.bytes_read == 3 * PAYLOAD_BYTES
        assert store.counters.busy_s > 0


def test_both_records_of_an_expert_are_lent(store_dir: Path, disk: Disk) -> None:
    """Red when the store takes an expert for its record: the exact bytes come twice."""
    with_small_variant(store_dir)
    with a_store(store_dir, disk) as store:
        borrower = Borrower(store)
        exact, small = KEYS[0], small_keys()[0]
        lent = borrower.get(exact, small)
        assert [item.bytes_read for item in lent] == [PAYLOAD_BYTES, SMALL_BYTES]
        assert lent[0].slot != lent[1].slot
        assert borrower.content(small)[:SMALL_BYTES] == borrower.content(exact)[:SMALL_BYTES]


def test_small_records_share_a_slot_and_a_quota(store_dir: Path, disk: Disk) -> None:
    """Red when a small record counts a slot, and when its bytes land at the slot's beginning."""
    with_small_variant(store_dir)
    with a_store(store_dir, disk) as store:
        assert store.sessions.lease_bytes == {"exact": 4 * 4096, SMALL: 4096}
        borrower, small = Borrower(store, quota_slots=3), small_keys()[:8]
        lent = borrower.get(*small, KEYS[9])
        assert [item.part for item in lent] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
        assert all(item.start_bytes == item.part * 4096 for item in lent)
        assert len({item.slot for item in lent}) == store.slots.counts()["leased"] == 3
        for key in small:
            exact = expert_bytes(store_dir, RecordKey(key.expert))
            assert borrower.content(key)[:SMALL_BYTES] == exact[:SMALL_BYTES]
        assert borrower.content(KEYS[9]) == expert_bytes(store_dir, KEYS[9])
        with pytest.raises(errors.SlotsExhausted, match=r"0\.0 MiB of 0\.0 MiB left"):
            borrower.ask(small_keys()[9])
        store.sessions.release(borrower.session, [small[0]])
        assert borrower.get(small_keys()[9])[0].error is None


def test_a_read_that_small_leases_leave_no_room_for_is_refused(store_dir: Path, disk: Disk) -> None:
    """Red when it waits: its quota allows it, and one small record is lent in each slot. What is
    released then has room.
    """
    with_small_variant(store_dir)
    with a_store(store_dir, disk, num_slots=4, read_depth=1) as store:
        borrower, small = Borrower(store, quota_slots=3), small_keys()
        borrower.get(*small)
        store.sessions.release(borrower.session, [key for key in small if key.expert.expert % 4])
        borrower.get(KEYS[0])
        [refused] = borrower.get(KEYS[1])
        assert isinstance(refused.error, errors.SlotsExhausted)
        assert "smaller variants are lent" in str(refused.error)
        store.sessions.release(borrower.session, [small[0]])
        assert borrower.get(KEYS[1])[0].error is None
        assert borrower.content(KEYS[1]) == expert_bytes(store_dir, KEYS[1])


def test_what_comes_in_part_is_read_on(store_dir: Path, disk: Disk) -> None:
    disk.brings_bytes = 1024
    with a_store(store_dir, disk, piece_bytes=4096) as store:
        borrower = Borrower(store)
        borrower.get(*KEYS[:3])
        assert all(borrower.content(key) == expert_bytes(store_dir, key) for key in KEYS[:3])


def test_the_device_goes_on_while_a_piece_is_hashed(
    store_dir: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing = threading.Event()

    def add(*arguments: Any) -> bool:
        assert hashing.wait(DEADLINE_S)
        return add_piece(*arguments)

    monkeypatch.setattr(module, "add_piece", add)
    monkeypatch.setattr(module, "_SHORT_BYTES", 0)
    with a_store(store_dir, disk, read_depth=1) as store:
        borrower = Borrower(store)
        borrower.ask(*KEYS[:2])
        until(lambda: disk.order == KEYS[:2])
        hashing.set()
        borrower.wait(*KEYS[:2])


def test_the_depth_is_kept(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=2, piece_bytes=4096) as store:
        disk.gate.clear()
        borrower = Borrower(store, 5)
        borrower.ask(*KEYS[:5])
        until(lambda: len(disk.order) == 2)
        disk.gate.set()
        borrower.wait(*KEYS[:5])
        assert disk.most == 2


def test_two_sessions_share_one_read(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk) as store:
        disk.gate.clear()
        one, other = Borrower(store), Borrower(store)
        one.ask(KEYS[0])
        other.ask(KEYS[0])
        disk.gate.set()
        [first], [second] = one.wait(KEYS[0]), other.wait(KEYS[0])
        assert disk.order == [KEYS[0]]
        assert (first.slot, first.generation) == (second.slot, second.generation)
        assert (first.bytes_read, second.bytes_read) == (PAYLOAD_BYTES, 0)
        assert (store.counters.demand_reads, store.counters.shared_hits) == (1, 1)


def test_a_session_ends_while_it_waits_and_the_other_is_served(store_dir: Path, disk: Disk) -> None:
    """The one that ends is the one whose demand started the read."""
    with a_store(store_dir, disk) as store:
        disk.gate.clear()
        leaver, stayer = Borrower(store), Borrower(store)
        leaver.ask(KEYS[0], KEYS[1])
        until(lambda: len(disk.order) == 2)
        stayer.ask(KEYS[0])
        store.sessions.close(leaver.session)
        disk.gate.set()
        stayer.wait(KEYS[0])
        assert stayer.content(KEYS[0]) == expert_bytes(store_dir, KEYS[0])
        until(lambda: store.is_idle)
        assert disk.order.count(KEYS[0]) == 1
        assert (leaver.came, leaver.session.leases, leaver.session.awaited) == ({}, {}, set())


def test_a_damaged_expert_is_quarantined_and_the_others_come(store_dir: Path, disk: Disk) -> None:
    flip(store_dir / FILE_NAME, expert_range(KEYS[1])[9])
    with a_store(store_dir, disk, piece_bytes=4096) as store:
        borrower = Borrower(store)
        good, bad, other = borrower.get(*KEYS[:3])
        assert isinstance(bad.error, errors.ExpertDamaged)
        assert (good.error, other.error) == (None, None)
        assert list(store.quarantined) == [KEYS[1]]
        assert set(borrower.session.leases) == {KEYS[0], KEYS[2]}
        reads = len(disk.order)
        store.prefetch(borrower.session, [KEYS[1]])
        [again] = borrower.get(KEYS[1])
        assert isinstance(again.error, errors.ExpertDamaged)
        assert len(disk.order) == reads, "it is not read again"
        assert store.counters.demand_reads == 2


def test_a_reader_outlives_what_nobody_foresaw(
    store_dir: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the thread dies: whoever waits would wait for ever."""
    failures = iter([RuntimeError("a bug")])

    def add(*arguments: Any) -> bool:
        for failure in failures:
            raise failure
        return add_piece(*arguments)

    monkeypatch.setattr(module, "add_piece", add)
    with a_store(store_dir, disk, read_depth=1) as store:
        borrower = Borrower(store)
        [failed] = borrower.get(KEYS[0])
        assert "a bug" in str(failed.error) and not store.quarantined
        [lent] = borrower.get(KEYS[0])
        assert lent.error is None


def test_a_prefetch_reads_when_nobody_waits(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, num_slots=9) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, KEYS[:2])
        until(lambda: bool(disk.order))
        borrower.ask(KEYS[5])
        disk.gate.set()
        borrower.wait(KEYS[5])
        until(lambda: store.is_idle)
        assert disk.order == [KEYS[0], KEYS[5], KEYS[1]]
        assert (store.counters.prefetch_reads, store.counters.demand_reads) == (2, 1)
        assert [item.bytes_read for item in borrower.get(*KEYS[:2])] == [0, 0]
        assert len(disk.order) == 3
        assert (store.counters.prefetches_used, store.counters.prefetch_bytes_wasted) == (2, 0)


def test_a_demand_goes_before_the_guesses_of_its_own_message(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1) as store:
        borrower = Borrower(store)
        exchange = pb.Exchange(prefetches=[KEYS[0].to_pb()], acquires=[KEYS[5].to_pb()])
        acquire = partial(store.acquire, borrower.session, deliver=borrower.take)
        perform(store, borrower.session, exchange, acquire)
        borrower.wait(KEYS[5])
        until(lambda: store.is_idle)
        assert disk.order == [KEYS[5], KEYS[0]]


def test_a_demand_goes_between_the_pieces_of_a_prefetch(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, piece_bytes=4096) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        until(lambda: bool(disk.order))
        borrower.ask(KEYS[5])
        disk.gate.set()
        borrower.wait(KEYS[5])
        until(lambda: store.is_idle)
        first = disk.order.index(KEYS[5])
        assert first == 1 and set(disk.order[first:-1]) >= {KEYS[5]}
        assert disk.order[-1] == KEYS[0], "what was begun is finished afterwards"
        borrower.get(KEYS[0])
        assert borrower.content(KEYS[0]) == expert_bytes(store_dir, KEYS[0])


def test_a_prefetch_somebody_asks_for_is_moved_up(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, KEYS[:4])
        until(lambda: bool(disk.order))
        borrower.ask(KEYS[3])
        disk.gate.set()
        borrower.wait(KEYS[3])
        until(lambda: store.is_idle)
        assert disk.order == [KEYS[n] for n in (0, 3, 1, 2)]
        assert store.counters.demand_reads == 1


def test_the_nearest_layer_is_read_ahead_first(store_dir: Path, disk: Disk) -> None:
    """Whatever the order in which guesses were asked for: layers that the session is past come in
    its next pass.
    """
    with a_store(store_dir, disk, read_depth=1, num_slots=12) as store:
        borrower = Borrower(store)
        first, second = [[key for key in KEYS if key.expert.layer == n] for n in LAYERS[:2]]
        borrower.get(first[0])
        disk.gate.clear()
        borrower.ask(first[1])
        until(lambda: len(disk.order) == 2)
        store.prefetch(borrower.session, [first[2]])
        store.prefetch(borrower.session, [second[3]])
        store.prefetch(borrower.session, [second[1]])
        disk.gate.set()
        until(lambda: store.is_idle)
        assert disk.order[2:] == [second[3], second[1], first[2]]


def test_what_is_withdrawn_is_not_read(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, num_slots=9) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, KEYS[:4])
        until(lambda: bool(disk.order))
        store.withdraw(borrower.session, KEYS[1:3])
        disk.gate.set()
        until(lambda: store.is_idle)
        assert disk.order == [KEYS[0], KEYS[3]]
        assert store.counters.prefetches_withdrawn == 2


def test_what_was_read_ahead_stays_until_it_is_had_or_withdrawn(
    store_dir: Path, disk: Disk
) -> None:
    """What nodes gave up goes before it, though they gave it up later.

    Planted faults seen red: a record read ahead goes by its age; one that was in memory when it was
    named goes by its age; a withdrawal forgotten once the record is whole; a session's wishes left
    behind.
    """
    with a_store(store_dir, disk, num_slots=6) as store:
        borrower, other = Borrower(store, 1), Borrower(store, 1)
        borrower.get(KEYS[5])
        store.sessions.release(borrower.session, [KEYS[5]])
        store.prefetch(other.session, [KEYS[0], KEYS[5]])
        until(lambda: store.is_idle)
        for _ in range(3):
            for number in (1, 2, 3, 4, 6, 7):
                borrower.get(KEYS[number])
                store.sessions.release(borrower.session, [KEYS[number]])
        assert {KEYS[0], KEYS[5]} <= set(store.slots.resident())
        store.withdraw(other.session, [KEYS[0]])
        borrower.get(KEYS[1] if KEYS[1] not in store.slots.resident() else KEYS[2])
        assert KEYS[0] not in store.slots.resident()
        store.sessions.close(other.session)
        assert store.slots.wished_by(other.session) == []


def test_bytes_read_ahead_are_used_once_a_session_acquires_their_record(
    store_dir: Path, disk: Disk
) -> None:
    """A demand for a record half read ahead uses that half; what is withdrawn was not used; and
    nothing is used twice.

    Planted faults seen red: a demand's pieces counted as read ahead; a second lease counted again;
    a withdrawn record's bytes counted as used.
    """
    with a_store(store_dir, disk, read_depth=1, num_slots=9, piece_bytes=4096) as store:
        borrower, other, counters = Borrower(store), Borrower(store, 1), store.counters
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        until(lambda: bool(disk.order))
        borrower.ask(KEYS[0])
        disk.gate.set()
        borrower.wait(KEYS[0])
        half_bytes = counters.prefetch_bytes_read
        assert 0 < half_bytes <= 4096 < PAYLOAD_BYTES
        assert counters.prefetch_bytes_used == half_bytes
        other.get(KEYS[0])
        assert counters.prefetch_bytes_used == half_bytes

        store.prefetch(borrower.session, [KEYS[1]])
        until(lambda: store.is_idle)
        assert counters.prefetch_bytes_read >= half_bytes + PAYLOAD_BYTES
        assert counters.prefetch_bytes_used == half_bytes
        borrower.get(KEYS[1])
        assert counters.prefetch_bytes_used == counters.prefetch_bytes_read

        used_bytes = counters.prefetch_bytes_used
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[2]])
        store.withdraw(borrower.session, [KEYS[2]])
        disk.gate.set()
        until(lambda: store.is_idle)
        borrower.get(KEYS[2])
        assert counters.prefetch_bytes_used == used_bytes < counters.prefetch_bytes_read


def test_the_busy_share_counts_the_read_at_the_device(store_dir: Path, disk: Disk) -> None:
    """A read that never ends would leave an idle disk otherwise.

    Planted fault seen red: only reads that ended counted.
    """
    with a_store(store_dir, disk, read_depth=1) as store:
        assert Stats.from_pb(store.snapshot()).busy_share == 0
        disk.gate.clear()
        Borrower(store).ask(KEYS[0])
        until(lambda: bool(disk.order))
        ended_s, share = store.counters.busy_s, Stats.from_pb(store.snapshot()).busy_share
        disk.gate.set()
        assert ended_s == 0 < share < 1
        until(lambda: store.is_idle)
        assert 0 < Stats.from_pb(store.snapshot()).busy_share < 1


def test_what_is_withdrawn_half_read_is_read_no_further(store_dir: Path, disk: Disk) -> None:
    """And its slot comes back, its bytes are counted as wasted, and it can be had afterwards."""
    with a_store(store_dir, disk, read_depth=1, piece_bytes=4096) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        until(lambda: bool(disk.order))
        store.withdraw(borrower.session, [KEYS[0]])
        disk.gate.set()
        until(lambda: store.is_idle)
        assert disk.order == [KEYS[0]]
        assert 0 < store.counters.prefetch_bytes_wasted <= 4096
        borrower.get(KEYS[0])
        assert borrower.content(KEYS[0]) == expert_bytes(store_dir, KEYS[0])


def test_what_is_withdrawn_and_guessed_again_is_read_on(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, piece_bytes=4096) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        until(lambda: bool(disk.order))
        store.withdraw(borrower.session, [KEYS[0]])
        store.prefetch(borrower.session, [KEYS[0]])
        disk.gate.set()
        until(lambda: store.is_idle)
        assert store.slots.resident() == [KEYS[0]]


def test_what_is_withdrawn_and_asked_for_after_all_is_read_on(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, piece_bytes=4096) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        until(lambda: bool(disk.order))
        store.withdraw(borrower.session, [KEYS[0]])
        borrower.ask(KEYS[0])
        disk.gate.set()
        borrower.wait(KEYS[0])
        assert borrower.content(KEYS[0]) == expert_bytes(store_dir, KEYS[0])


def test_what_another_session_wants_too_is_not_withdrawn(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1) as store:
        one, other = Borrower(store), Borrower(store)
        disk.gate.clear()
        store.prefetch(one.session, KEYS[:2])
        store.prefetch(other.session, [KEYS[1]])
        store.withdraw(one.session, [KEYS[1]])
        disk.gate.set()
        until(lambda: store.is_idle)
        assert disk.order == KEYS[:2]


def test_what_is_withdrawn_when_all_of_it_came_stays(
    store_dir: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of its first piece is told so after the one of its last: red when that gives up
    what is lent already.
    """
    first_is_late = threading.Event()

    def add(*arguments: Any) -> bool:
        if add_piece(*arguments):
            return True
        assert first_is_late.wait(DEADLINE_S)
        return False

    monkeypatch.setattr(module, "add_piece", add)
    with a_store(store_dir, disk, read_depth=2, piece_bytes=8192) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        until(lambda: len(disk.order) == 2)
        store.withdraw(borrower.session, [KEYS[0]])
        disk.gate.set()
        until(lambda: store.slots.resident() == [KEYS[0]])
        first_is_late.set()
        for key in KEYS[1:4]:
            borrower.get(key)
            store.sessions.release(borrower.session, [key])
        assert KEYS[0] in store.slots.resident()


def test_a_demand_without_a_slot_waits_for_those_that_have_one(store_dir: Path, disk: Disk) -> None:
    """Half read guesses are finished when nothing else can be: their slots are needed."""
    with a_store(store_dir, disk, read_depth=1, num_slots=3, piece_bytes=4096) as store:
        borrower = Borrower(store, 2)
        disk.gate.clear()
        store.prefetch(borrower.session, [KEYS[0]])
        store.prefetch(borrower.session, KEYS[1:3])
        fills = [store._reads.fills[key] for key in KEYS[:3]]
        with store.lock:
            assert store._give_memory(fills[1]) and store._give_memory(fills[2])
        borrower.ask(*KEYS[4:6])
        disk.gate.set()
        borrower.wait(*KEYS[4:6])


@pytest.mark.parametrize(
    ("error", "is_lost"), [(errno.EIO, True), (errno.ENOMEM, False), (errno.ESTALE, False)]
)
def test_only_what_is_lost_is_quarantined(
    error: int, is_lost: bool, store_dir: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any) -> int:
        raise OSError(error, os.strerror(error))

    disk.brings_bytes = 0
    with a_store(store_dir, disk) as store:
        borrower = Borrower(store)
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", read)
            [lent] = borrower.get(KEYS[0])
        assert type(lent.error) is (errors.ExpertDamaged if is_lost else errors.Unavailable)
        assert list(store.quarantined) == [KEYS[0]] * is_lost
        [again] = borrower.get(KEYS[0])
        assert (again.error is not None) == is_lost


def test_a_reader_that_fails_ends_the_process(
    store_dir: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when it dies alone: whoever waits would wait for ever."""
    ended = threading.Event()
    monkeypatch.setattr(module, "_end_process", ended.set)

    def deliver(leases: list[pb.Lease]) -> None:
        raise RuntimeError("a bug")

    with a_store(store_dir, disk) as store:
        store.acquire(Borrower(store).session, [KEYS[0]], deliver)
        assert ended.wait(DEADLINE_S)


def test_prefetches_take_spare_slots_alone(store_dir: Path, disk: Disk) -> None:
    """What is lent stays, and what a guess brought goes for the next guess, counted as wasted."""
    with a_store(store_dir, disk, read_depth=2, num_slots=5) as store:
        borrower = Borrower(store, 3)
        borrower.get(*KEYS[:3])
        for key in KEYS[4:8]:
            store.prefetch(borrower.session, [key])
            until(lambda: store.is_idle)
        assert set(borrower.session.leases) == set(KEYS[:3])
        assert set(store.slots.resident()) == {*KEYS[:3], *KEYS[6:8]}
        assert store.counters.prefetch_bytes_wasted == 2 * PAYLOAD_BYTES


def test_guesses_never_keep_a_demand_from_its_slot(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=2, num_slots=4, piece_bytes=4096) as store:
        borrower = Borrower(store, 2)
        disk.gate.clear()
        store.prefetch(borrower.session, KEYS[2:8])
        until(lambda: len(disk.order) == 2)
        borrower.ask(*KEYS[:2])
        disk.gate.set()
        borrower.wait(*KEYS[:2])


def test_prefetches_beyond_the_queue_are_dropped_and_counted(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, max_queued=3) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.prefetch(borrower.session, KEYS[:8])
        assert store.counters.prefetches_dropped == 5
        store.prefetch(borrower.session, KEYS[:3])  # under way: neither read again nor dropped
        assert store.counters.prefetches_dropped == 5
        borrower.ask(KEYS[9])
        disk.gate.set()
        assert borrower.wait(KEYS[9])[0].error is None, "prefetches refuse no demand"


def test_a_full_queue_refuses_demands(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk, read_depth=1, max_queued=2) as store:
        borrower, other = Borrower(store), Borrower(store)
        disk.gate.clear()
        borrower.ask(*KEYS[:3])
        until(lambda: bool(disk.order))
        with pytest.raises(errors.QueueFull):
            other.ask(KEYS[5])
        assert other.session.awaited == set()
        disk.gate.set()
        borrower.wait(*KEYS[:3])


def test_a_quota_is_not_counted_twice_while_siblings_are_read(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk) as store:
        borrower = Borrower(store, quota_slots=4)
        borrower.get(KEYS[0])
        disk.gate.clear()
        borrower.ask(KEYS[1])
        borrower.ask(*KEYS[2:4])
        with pytest.raises(errors.SlotsExhausted):
            borrower.ask(KEYS[4])
        disk.gate.set()
        borrower.wait(*KEYS[1:4])
        assert len(borrower.session.leases) == 4


@pytest.mark.parametrize(
    "key",
    [
        RecordKey.exact(2, 0),
        RecordKey.exact(1, 6),
        RecordKey.exact((1 << 32) - 1, 0),
        RecordKey(ExpertKey(1, 0), "int4"),
    ],
)
def test_unknown_experts_are_refused(key: RecordKey, store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk) as store:
        borrower = Borrower(store)
        with pytest.raises(errors.UnknownExpert, match=str(key)):
            borrower.ask(KEYS[0], key)
        with pytest.raises(errors.UnknownExpert):
            store.prefetch(borrower.session, [key])
        assert disk.order == []


def test_an_expert_is_asked_for_once(store_dir: Path, disk: Disk) -> None:
    with a_store(store_dir, disk) as store:
        borrower = Borrower(store)
        with pytest.raises(errors.InvalidRequest, match="twice"):
            borrower.ask(KEYS[0], KEYS[0])
        borrower.ask(KEYS[0])
        with pytest.raises(errors.InvalidRequest, match="already"):
            borrower.ask(KEYS[0])


def test_every_slot_serves_many_experts_in_turn(store_dir: Path, disk: Disk) -> None:
    """More experts than slots, guesses right and wrong between: bytes are right each time."""
    with a_store(store_dir, disk, num_slots=4, piece_bytes=4096) as store:
        borrower = Borrower(store, quota_slots=2)
        for number in range(3 * len(KEYS)):
            key = KEYS[number % len(KEYS)]
            store.prefetch(borrower.session, [KEYS[(number + step) % len(KEYS)] for step in (1, 3)])
            store.withdraw(borrower.session, [KEYS[(number + 3) % len(KEYS)]])
            borrower.get(key)
            assert borrower.content(key) == expert_bytes(store_dir, key)
            store.sessions.release(borrower.session, [key])


def test_a_refill_fills_free_slots_last_of_all(store_dir: Path, disk: Disk) -> None:
    """Demand and guesses go before it, what is lent stays, and spare slots stay spare."""
    with a_store(store_dir, disk, read_depth=1, num_slots=6) as store:
        borrower = Borrower(store)
        borrower.get(KEYS[0])
        disk.gate.clear()
        store.refill([RecordKey.exact(77, 0), *KEYS])
        until(lambda: len(disk.order) == 2)
        borrower.ask(KEYS[9])
        store.prefetch(borrower.session, [KEYS[8]])
        disk.gate.set()
        borrower.wait(KEYS[9])
        until(lambda: store.is_idle)
        assert disk.order[2:4] == [KEYS[9], KEYS[8]]
        assert set(borrower.session.leases) == {KEYS[0], KEYS[9]}
        assert store.slots.counts()["free"] == store.num_spare
        assert store.counters.refill_reads == 6 - 3 - store.num_spare
        assert store.counters.prefetch_bytes_wasted == 0


def test_stopping_leaves_nothing_half_filled(store_dir: Path, disk: Disk) -> None:
    """Whoever still waits is told, and readers are gone."""
    before = threading.active_count()
    told: list[pb.Lease] = []
    with a_store(store_dir, disk, read_depth=1) as store:
        borrower = Borrower(store)
        disk.gate.clear()
        store.acquire(borrower.session, KEYS[:2], told.extend)
        until(lambda: bool(disk.order))
        stopping = threading.Thread(target=store.stop)
        stopping.start()
        until(lambda: store._reads._is_stopping)
        stopping.join(0.05)
        assert stopping.is_alive(), "it waits for what the device was asked"
        disk.gate.set()
        stopping.join(DEADLINE_S)
        disk.stop()
        until(lambda: threading.active_count() == before)
        store.give_up()
    assert {item.key: type(item.error) for item in map(read_lease, told)} == {
        KEYS[0]: type(None),
        KEYS[1]: errors.Unavailable,
    }
