"""Quotas, leases that outlive a stream while the node's lock is held, and locks of earlier nodes.

Planted faults seen red: orphans' quotas not counted, an orphan ended while its lock is held, no
sweep on open, a lease added to a session that has ended, one expert leased twice by a session,
a lock name that leaves the folder.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expert_store.store import segment
from expert_store.store.sessions import Session, SessionTable, await_free_locks, lock_is_free
from expert_store.store.slots import Part, SlotPool
from proto import errors
from proto.expert import RecordKey
from proto.shm import SegmentLayout
from tests.expert_store.raw_session import DEADLINE_S, Lock, counts_add_up

NUM_SLOTS, MAX_LEASED = 8, 6
MIB = 1 << 20


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[SlotPool]:
    with segment.create(tmp_path / "segment", SegmentLayout(NUM_SLOTS, 4096)) as shared:
        yield SlotPool(shared)


@pytest.fixture
def session_dir(tmp_path: Path) -> Path:
    (tmp_path / "sessions").mkdir()
    return tmp_path / "sessions"


@pytest.fixture
async def table(slots: SlotPool, session_dir: Path) -> AsyncIterator[SessionTable]:
    sessions = SessionTable(
        slots, threading.RLock(), MAX_LEASED * MIB, {"exact": MIB}, session_dir, lock_poll_s=0.005
    )
    yield sessions
    sessions.stop()
    await asyncio.sleep(0)


def borrow(table: SessionTable, slots: SlotPool, session: Session, *numbers: int) -> None:
    for number in numbers:
        key = RecordKey.exact(0, number)
        table.reserve(session, [key])
        assert table.lease(session, key, fill(slots, key))


def fill(slots: SlotPool, key: RecordKey) -> Part:
    taken = slots.fill(1)
    assert taken is not None
    slots.seal(taken[0], key)
    return taken[0]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  another task's doing, or another process's
            await asyncio.sleep(0.002)


async def test_quotas_never_exceed_what_can_be_leased(table: SessionTable) -> None:
    first = table.open("a", 4 * MIB, None)
    with pytest.raises(errors.SlotsExhausted, match=r"3.0 MiB asked, 2.0 MiB of 6.0 MiB left"):
        table.open("b", 3 * MIB, None)
    second = table.open("b", 2 * MIB, None)
    assert table.num_open == 2
    table.close(first)
    table.open("c", 4 * MIB, None)
    table.close(second)
    assert table.num_open == 1


@pytest.mark.parametrize("quota_bytes", [0, -1])
async def test_a_quota_is_positive(table: SessionTable, quota_bytes: int) -> None:
    with pytest.raises(errors.InvalidRequest, match="positive"):
        table.open("a", quota_bytes, None)


async def test_a_session_borrows_up_to_its_quota(table: SessionTable, slots: SlotPool) -> None:
    session = table.open("a", 3 * MIB, None)
    borrow(table, slots, session, 1, 2)
    with pytest.raises(errors.SlotsExhausted, match=r"2.0 MiB more asked, 1.0 MiB of 3.0 MiB left"):
        table.reserve(session, [RecordKey.exact(0, 3), RecordKey.exact(0, 4)])
    table.reserve(session, [RecordKey.exact(0, 3)])
    with pytest.raises(errors.SlotsExhausted):
        table.reserve(session, [RecordKey.exact(0, 4)])
    table.release(session, [RecordKey.exact(0, 1)])
    with pytest.raises(errors.InvalidRequest, match="L00E001 is not leased"):
        table.release(session, [RecordKey.exact(0, 1)])
    table.close(session)
    assert counts_add_up(slots, NUM_SLOTS)


async def test_an_expert_is_leased_once_a_session(table: SessionTable, slots: SlotPool) -> None:
    """Red without it: the second lease is nobody's, and its slot is lost for good."""
    session = table.open("a", 3 * MIB, None)
    borrow(table, slots, session, 1)
    table.reserve(session, [RecordKey.exact(0, 2)])
    for leased_or_awaited in (RecordKey.exact(0, 1), RecordKey.exact(0, 2)):
        with pytest.raises(errors.InvalidRequest, match="leased by this session already"):
            table.reserve(session, [leased_or_awaited])
    table.close(session)
    assert counts_add_up(slots, NUM_SLOTS)


async def test_leases_outlive_the_stream_while_the_lock_is_held(
    table: SessionTable, slots: SlotPool, session_dir: Path
) -> None:
    with Lock(session_dir, "a.lock") as lock:
        session = table.open("a", 5 * MIB, "a.lock")
        borrow(table, slots, session, 1, 2)
        table.close(session)
        assert (table.num_open, table.num_orphaned, slots.counts()["leased"]) == (0, 1, 2)
        with pytest.raises(errors.SlotsExhausted):
            table.open("b", 2 * MIB, None)
        lock.let_go()
        await until(lambda: table.num_orphaned == 0)
    assert counts_add_up(slots, NUM_SLOTS)
    assert names(session_dir) == []
    table.close(table.open("b", 6 * MIB, None))


async def test_a_free_lock_ends_the_session_at_once(
    table: SessionTable, slots: SlotPool, session_dir: Path
) -> None:
    lock = Lock(session_dir, "a.lock")
    session = table.open("a", 5 * MIB, "a.lock")
    borrow(table, slots, session, 1)
    lock.let_go()
    table.close(session)
    assert (table.num_open, table.num_orphaned) == (0, 0)
    assert counts_add_up(slots, NUM_SLOTS)


async def test_opening_sweeps_sessions_whose_node_let_go(
    table: SessionTable, slots: SlotPool, session_dir: Path
) -> None:
    """A node that restarts asks for its quota again before the store heard that it died."""
    first, second = Lock(session_dir, "a.lock"), Lock(session_dir, "b.lock")
    opened = table.open("a", 3 * MIB, "a.lock")
    orphaned = table.open("b", 3 * MIB, "b.lock")
    for number, session in enumerate((opened, orphaned)):
        borrow(table, slots, session, number)
    table.close(orphaned)
    first.let_go()
    second.let_go()
    again = table.open("a", 6 * MIB, None)
    assert (table.num_open, table.num_orphaned) == (1, 0)
    table.close(opened)
    table.close(orphaned)
    table.close(again)
    assert counts_add_up(slots, NUM_SLOTS)


async def test_a_session_that_ended_leases_no_more(
    table: SessionTable, slots: SlotPool, session_dir: Path
) -> None:
    """Red without it: its node let go while a read was under way, and the slot is lost for good."""
    lock = Lock(session_dir, "a.lock")
    session = table.open("a", 3 * MIB, "a.lock")
    table.reserve(session, [RecordKey.exact(0, 1)])
    lock.let_go()
    table.close(table.open("b", 1 * MIB, None))
    assert not table.lease(session, RecordKey.exact(0, 1), fill(slots, RecordKey.exact(0, 1)))
    with pytest.raises(errors.Unavailable, match="closed"):
        table.reserve(session, [RecordKey.exact(0, 2)])
    table.close(session)
    assert counts_add_up(slots, NUM_SLOTS)


@settings(deadline=None, max_examples=200)
@given(name=st.text(max_size=30))
@example(name="")
@example(name=".")
@example(name="..")
@example(name="../x")
@example(name="/etc/passwd")
@example(name="a\0b.lock")
@example(name="x" * 300 + ".lock")
@example(name="folder.lock")
@example(name="link.lock")
@example(name="\ud800.lock")
def test_a_lock_name_that_is_no_held_lock_is_refused(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("locks")
    (folder / "folder.lock").mkdir()
    (folder / "link.lock").symlink_to("/etc/passwd")
    table = SessionTable(
        SlotPool.__new__(SlotPool), threading.RLock(), MAX_LEASED * MIB, {}, folder, 0.1
    )
    with pytest.raises(errors.InvalidRequest, match="lock"):
        table.open("a", 1 * MIB, name)
    assert table.num_open == 0


async def test_a_held_lock_elsewhere_is_not_taken(
    table: SessionTable, session_dir: Path, tmp_path: Path
) -> None:
    """Red when names are joined as they come: the store would remove a file that is not its own."""
    with Lock(tmp_path, "outside.lock") as outside, Lock(session_dir, ".hidden.lock"):
        for name in (
            "../outside.lock",
            str(outside.path),
            ".hidden.lock",
            "../sessions/.hidden.lock",
        ):
            with pytest.raises(errors.InvalidRequest, match="not a plain"):
                table.open("a", 1 * MIB, name)


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_is_free(path)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert not lock_is_free(path)
        process.kill()
        process.wait()
        assert lock_is_free(path)


async def test_a_new_store_waits_for_the_nodes_of_the_last_one(session_dir: Path) -> None:
    (session_dir / "left-by-the-dead.lock").write_text("")
    lock = Lock(session_dir, "node.lock")
    waiting = asyncio.create_task(await_free_locks(session_dir, 0.002, DEADLINE_S))
    await until(lambda: names(session_dir) == ["node.lock"])
    assert not waiting.done()
    lock.let_go()
    await waiting
    assert names(session_dir) == []


async def test_a_node_that_does_not_let_go_is_named(session_dir: Path) -> None:
    with (
        Lock(session_dir, "node.lock"),
        pytest.raises(errors.AlreadyRunning, match=r"node\.lock"),
    ):
        await await_free_locks(session_dir, 0.002, 0.01)
    await await_free_locks(session_dir / "new", 0.002, 0.01)
