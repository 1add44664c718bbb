"""One read for everybody who waits.

Planted faults seen red: no shield around the task, the key kept after the read, an exception
nobody retrieves.
"""

from __future__ import annotations

import asyncio
import gc

import pytest

from expert_store.inflight import Inflight
from proto.expert import ExpertKey

KEY, OTHER = ExpertKey(0, 1), ExpertKey(0, 2)


class Disk:
    """Counts reads; they end when told to."""

    def __init__(self) -> None:
        self.reads = 0
        self.let_go = asyncio.Event()

    async def read(self) -> int:
        self.reads += 1
        number = self.reads
        await self.let_go.wait()
        return number

    async def fail(self) -> int:
        await self.read()
        raise ValueError("damaged")


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_ten_callers_one_read() -> None:
    disk, inflight = Disk(), Inflight[int]()
    waiters = [asyncio.create_task(inflight.join(KEY, disk.read)) for _ in range(10)]
    other = asyncio.create_task(inflight.join(OTHER, disk.read))
    await settle()
    assert (disk.reads, len(inflight), KEY in inflight) == (2, 2, True)
    disk.let_go.set()
    assert await asyncio.gather(*waiters) == [1] * 10
    assert await other == 2
    assert (len(inflight), KEY in inflight) == (0, False)
    assert await inflight.join(KEY, disk.read) == 3, "what is over is read again"


async def test_a_waiter_leaves_and_the_read_goes_on() -> None:
    """Red without the shield: one client that goes away takes the others' read with it."""
    disk, inflight = Disk(), Inflight[int]()
    waiters = [asyncio.create_task(inflight.join(KEY, disk.read)) for _ in range(3)]
    await settle()
    waiters[0].cancel()
    await settle()
    assert waiters[0].cancelled()
    assert KEY in inflight
    disk.let_go.set()
    assert await asyncio.gather(*waiters[1:]) == [1, 1]


async def test_the_read_goes_on_when_all_have_left() -> None:
    disk, inflight = Disk(), Inflight[int]()
    waiter = asyncio.create_task(inflight.join(KEY, disk.read))
    await settle()
    waiter.cancel()
    await settle()
    task = inflight.start(KEY, disk.read)
    disk.let_go.set()
    assert await task == 1


async def test_a_failure_reaches_every_waiter() -> None:
    disk, inflight = Disk(), Inflight[int]()
    waiters = [asyncio.create_task(inflight.join(KEY, disk.fail)) for _ in range(3)]
    disk.let_go.set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [str(result) for result in results] == ["damaged"] * 3
    assert len(inflight) == 0


async def test_a_failure_nobody_waits_for_is_quiet() -> None:
    """Red when the exception is never retrieved: asyncio complains when the task is collected."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    disk, inflight = Disk(), Inflight[int]()
    inflight.start(KEY, disk.fail)
    disk.let_go.set()
    await inflight.drain()
    await settle()
    gc.collect()
    assert complaints == []


async def test_drain_waits_for_all() -> None:
    disk, inflight = Disk(), Inflight[int]()
    inflight.start(KEY, disk.read)
    inflight.start(OTHER, disk.fail)
    draining = asyncio.create_task(inflight.drain())
    await settle()
    assert not draining.done()
    disk.let_go.set()
    await draining
    assert len(inflight) == 0


async def test_an_error_of_one_read_does_not_stick() -> None:
    disk, inflight = Disk(), Inflight[int]()
    disk.let_go.set()
    with pytest.raises(ValueError, match="damaged"):
        await inflight.join(KEY, disk.fail)
    assert await inflight.join(KEY, disk.read) == 2
