"""The queue before the compute thread: who leaves frees a place, who must go is told why.

Planted faults seen red: a job that was cancelled keeps its place until the one before it ends, jobs
under way at a stop cut off without a word, jobs that wait forgotten at a stop, idle work that hears
of no request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.job import Work
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.schedule import Schedule
from compute_node.engine.seat import Seat
from proto import errors

MAX_QUEUED = 3


def schedule() -> Schedule:
    return Schedule(MAX_QUEUED, KvRoom())


class Busy:
    """Goes on until it is let go, looking now and then whether it should."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, seat: Seat) -> Iterator[str]:
        self.started.set()
        while not self.go_on.wait(0.005):
            seat.check()
        yield "done"


async def outcome(compute: ComputeThread, work: Any) -> list[str]:
    return [result async for _, result in compute.run(Work(work), None)]


async def busy(compute: ComputeThread) -> tuple[Busy, asyncio.Task[list[str]]]:
    work = Busy()
    task = asyncio.create_task(outcome(compute, work))
    assert await asyncio.to_thread(work.started.wait, 10)
    return work, task


async def queued(compute: ComputeThread, number: int) -> list[asyncio.Task[list[str]]]:
    tasks = [asyncio.create_task(outcome(compute, lambda _: iter(["x"]))) for _ in range(number)]
    await asyncio.sleep(0)
    return tasks


async def test_whoever_leaves_the_queue_frees_a_place_at_once() -> None:
    with ComputeThread(schedule()) as compute:
        work, running = await busy(compute)
        for _ in range(4):
            waiting = await queued(compute, MAX_QUEUED)
            assert compute.schedule.num_queued == MAX_QUEUED
            with pytest.raises(errors.QueueFull):
                await outcome(compute, work)
            for task in waiting:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            assert compute.schedule.num_queued == 0
        (last,) = await queued(compute, 1)
        work.go_on.set()
        assert (await running, await last) == (["done"], ["x"])


async def test_a_stop_tells_whoever_it_cannot_wait_for() -> None:
    with ComputeThread(schedule(), grace_s=0.1) as compute:
        _, running = await busy(compute)
        waiting = await queued(compute, 2)
        compute.drain()
        for task in (running, *waiting):
            with pytest.raises(errors.Unavailable, match="the node is stopping"):
                await asyncio.wait_for(task, 10)
        with pytest.raises(errors.Unavailable, match="the node is stopping"):
            await outcome(compute, Busy())


async def test_a_stop_lets_finish_what_finishes_in_time() -> None:
    with ComputeThread(schedule(), grace_s=60) as compute:
        work, running = await busy(compute)
        (waiting,) = await queued(compute, 1)
        compute.drain()
        work.go_on.set()
        assert (await running, await waiting) == (["done"], ["x"])


async def test_idle_work_hears_of_a_request_and_of_a_stop() -> None:
    """Each would wait for it otherwise."""
    idle, pause = threading.Event(), threading.Event()

    def until_there_is_work(has_work: Callable[[], bool]) -> None:
        idle.set()
        while not has_work():
            pause.wait(0.005)

    with ComputeThread(schedule(), until_there_is_work) as compute:
        assert await asyncio.to_thread(idle.wait, 10)
        assert await asyncio.wait_for(outcome(compute, lambda _: iter(["x"])), 10) == ["x"]
        idle.clear()
        assert await asyncio.to_thread(idle.wait, 10)
