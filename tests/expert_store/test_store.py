"""Lending: one read for all, damage kept apart, prefetches that stand back, slots that come back.

Planted faults seen red: a task a waiter instead of single flight, no quarantine, the first error
ending the whole exchange, reserved slots counted twice while siblings are read, two messages that
ask for one expert, prefetches without bound in one message.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from expert_store import segment
from expert_store import store as module
from expert_store.manifest import Manifest
from expert_store.reader import ReadQueue, open_files, read_record
from expert_store.sessions import Session, SessionTable
from expert_store.slots import SlotPool
from expert_store.store import ExpertStore, Lent
from proto import errors
from proto.expert import ExpertKey
from tests.expert_store.raw_session import DEADLINE_S, counts_add_up
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    PAYLOAD_BYTES,
    expert_bytes,
    expert_range,
    flip,
)

NUM_SLOTS = 8


@dataclass
class Disk:
    """Real reads, that can be held up and are listed in the order they were started."""

    order: list[ExpertKey] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def read(self, files: Any, record: Any, slot: memoryview) -> None:
        self.order.append(record.key)
        assert self.gate.wait(DEADLINE_S)
        read_record(files, record, slot)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    disk.gate.set()
    monkeypatch.setattr(module, "read_record", disk.read)
    return disk


@asynccontextmanager
async def a_store(
    folder: Path, read_depth: int = 2, max_queued: int = 16, num_slots: int = NUM_SLOTS
) -> AsyncIterator[ExpertStore]:
    """Idle again at the end, or it fails."""
    manifest = Manifest.load(folder)
    with (
        segment.create(folder / "segment", num_slots, manifest.slot_bytes) as shared,
        open_files(manifest, folder, True) as files,
    ):
        slots, queue = SlotPool(shared), ReadQueue(read_depth, max_queued)
        sessions = SessionTable(slots, num_slots - read_depth, folder / "sessions", 0.01)
        store = ExpertStore(manifest, shared, slots, sessions, queue, files)
        try:
            yield store
            for session in list(sessions._open):
                sessions.close(session)
            await store.drain()
            assert counts_add_up(slots, num_slots), slots.counts()
        finally:
            await store.drain()
            queue.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  a reader thread's doing
            await asyncio.sleep(0.001)


def content(store: ExpertStore, lent: Lent) -> bytes:
    with store.segment.slot(lent.slot) as view:
        return bytes(view[lent.tensor_offsets[0] :][:PAYLOAD_BYTES])


def open_session(store: ExpertStore, quota_slots: int = 3) -> Session:
    return store.sessions.open("node", quota_slots, None)


async def test_experts_come_in_order_and_whole(store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir) as store:
        lent = await store.acquire(open_session(store), KEYS[2::-1])
        assert [item.key for item in lent] == KEYS[2::-1]
        assert all(content(store, item) == expert_bytes(store_dir, item.key) for item in lent)
        assert [item.bytes_read for item in lent] == [PAYLOAD_BYTES] * 3
        assert (store.counters.demand_reads, store.counters.shared_hits) == (3, 0)
        assert store.counters.bytes_read == 3 * PAYLOAD_BYTES


async def test_two_sessions_share_one_read(store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir) as store:
        disk.gate.clear()
        waiters = [
            asyncio.create_task(store.acquire(open_session(store), [KEYS[0]])) for _ in range(2)
        ]
        await until(lambda: disk.order)
        disk.gate.set()
        (first,), (second,) = await asyncio.gather(*waiters)
        assert disk.order == [KEYS[0]]
        assert (first.slot, first.generation) == (second.slot, second.generation)
        assert (first.bytes_read, second.bytes_read) == (PAYLOAD_BYTES, 0)
        assert (store.counters.demand_reads, store.counters.shared_hits) == (1, 1)


async def test_a_waiter_leaves_and_the_other_is_served(store_dir: Path, disk: Disk) -> None:
    """The one that leaves is the one whose demand started the read."""
    async with a_store(store_dir) as store:
        disk.gate.clear()
        leaver, stayer = open_session(store), open_session(store)
        leaving = asyncio.create_task(store.acquire(leaver, [KEYS[0], KEYS[1]]))
        await until(lambda: disk.order)
        staying = asyncio.create_task(store.acquire(stayer, [KEYS[0]]))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        disk.gate.set()
        (lent,) = await staying
        assert content(store, lent) == expert_bytes(store_dir, KEYS[0])
        assert disk.order.count(KEYS[0]) == 1
        assert (leaver.leases, leaver.reserved) == ({}, 0)


async def test_a_damaged_expert_is_quarantined_and_the_others_come(
    store_dir: Path, disk: Disk
) -> None:
    flip(store_dir / FILE_NAME, expert_range(KEYS[1])[9])
    async with a_store(store_dir) as store:
        session = open_session(store)
        good, bad, other = await store.acquire(session, KEYS[:3])
        assert isinstance(bad.error, errors.ExpertDamaged)
        assert (good.error, other.error) == (None, None)
        assert list(store.quarantined) == [KEYS[1]]
        assert set(session.leases) == {KEYS[0], KEYS[2]}
        store.prefetch([KEYS[1]])
        (again,) = await store.acquire(session, [KEYS[1]])
        assert isinstance(again.error, errors.ExpertDamaged)
        assert disk.order.count(KEYS[1]) == 1, "it is not read again"
        assert store.counters.demand_reads == 2


async def test_a_prefetch_reads_when_nobody_waits(store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir, read_depth=1) as store:
        session = open_session(store)
        disk.gate.clear()
        store.prefetch(KEYS[:3])
        await until(lambda: disk.order)
        acquiring = asyncio.create_task(store.acquire(session, [KEYS[5]]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        disk.gate.set()
        await acquiring
        await store.drain()
        assert disk.order == [KEYS[0], KEYS[5], KEYS[1], KEYS[2]]
        assert (store.counters.prefetch_reads, store.counters.demand_reads) == (3, 1)
        lent = await store.acquire(session, KEYS[:2])
        assert [item.bytes_read for item in lent] == [0, 0]
        assert len(disk.order) == 4


async def test_a_prefetch_somebody_asks_for_is_moved_up(store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir, read_depth=1) as store:
        disk.gate.clear()
        store.prefetch(KEYS[:4])
        await until(lambda: disk.order)
        acquiring = asyncio.create_task(store.acquire(open_session(store), [KEYS[3]]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        disk.gate.set()
        await acquiring
        await store.drain()
        assert disk.order == [KEYS[n] for n in (0, 3, 1, 2)]


async def test_prefetches_beyond_the_queue_are_dropped_and_counted(
    store_dir: Path, disk: Disk
) -> None:
    """Red when only what already waits is counted: one message could start any number."""
    async with a_store(store_dir, read_depth=1, max_queued=2) as store:
        disk.gate.clear()
        store.prefetch(KEYS[:8])
        await until(lambda: disk.order)
        assert store.counters.prefetches_dropped == 5
        store.prefetch(KEYS[:3])  # under way: neither read again nor dropped
        assert store.counters.prefetches_dropped == 5
        acquiring = asyncio.create_task(store.acquire(open_session(store), [KEYS[9]]))
        await asyncio.sleep(0)
        disk.gate.set()
        (lent,) = await acquiring
        assert lent.error is None, "prefetches refuse no demand"


async def test_a_full_queue_refuses_demands(store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir, read_depth=1, max_queued=2) as store:
        disk.gate.clear()
        waiting = asyncio.create_task(store.acquire(open_session(store), KEYS[:3]))
        await until(lambda: disk.order)
        other = open_session(store)
        with pytest.raises(errors.QueueFull):
            await store.acquire(other, [KEYS[5]])
        assert other.reserved == 0
        disk.gate.set()
        await waiting


async def test_a_quota_is_not_counted_twice_while_siblings_are_read(
    store_dir: Path, disk: Disk
) -> None:
    """Red when a lease stays reserved until its whole message is answered."""
    async with a_store(store_dir) as store:
        session = open_session(store, quota_slots=4)
        first = await store.acquire(session, [KEYS[0]])
        store.sessions.release(session, [first[0].key])
        disk.gate.clear()
        slow = asyncio.create_task(store.acquire(session, KEYS[:2]))
        await until(lambda: KEYS[0] in session.leases and KEYS[1] in disk.order)
        other = asyncio.create_task(store.acquire(session, KEYS[2:4]))
        await asyncio.sleep(0)
        disk.gate.set()
        await asyncio.gather(slow, other)
        assert len(session.leases) == 4
        with pytest.raises(errors.SlotsExhausted):
            await store.acquire(session, [KEYS[4]])


async def test_one_expert_in_two_messages_is_leased_once(store_dir: Path, disk: Disk) -> None:
    """Red without the check when leasing: neither message sees the other's lease when it comes."""
    async with a_store(store_dir) as store:
        session = open_session(store)
        disk.gate.clear()
        asked = [asyncio.create_task(store.acquire(session, [KEYS[0]])) for _ in range(2)]
        await until(lambda: disk.order)
        disk.gate.set()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(result) for result in results] == [list, errors.InvalidRequest]
        assert session.reserved == 0


@pytest.mark.parametrize("key", [ExpertKey(2, 0), ExpertKey(1, 6), ExpertKey((1 << 32) - 1, 0)])
async def test_unknown_experts_are_refused(key: ExpertKey, store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir) as store:
        session = open_session(store)
        with pytest.raises(errors.UnknownExpert, match=str(key)):
            await store.acquire(session, [KEYS[0], key])
        with pytest.raises(errors.UnknownExpert):
            store.prefetch([key])
        assert disk.order == []


async def test_an_expert_is_asked_for_once(store_dir: Path, disk: Disk) -> None:
    async with a_store(store_dir) as store:
        session = open_session(store)
        with pytest.raises(errors.InvalidRequest, match="twice"):
            await store.acquire(session, [KEYS[0], KEYS[0]])
        await store.acquire(session, [KEYS[0]])
        with pytest.raises(errors.InvalidRequest, match="already"):
            await store.acquire(session, [KEYS[0]])


async def test_every_slot_serves_many_experts_in_turn(store_dir: Path, disk: Disk) -> None:
    """More experts than slots, prefetches between: bytes are right each time."""
    async with a_store(store_dir, num_slots=4) as store:
        session = open_session(store, quota_slots=2)
        for number in range(3 * len(KEYS)):
            store.prefetch([KEYS[(number + 3) % len(KEYS)]])
            (lent,) = await store.acquire(session, [KEYS[number % len(KEYS)]])
            assert content(store, lent) == expert_bytes(store_dir, lent.key)
            store.sessions.release(session, [lent.key])
