"""Turns: even between clients, short where nothing is lost by it.

Planted faults seen red: jobs served in turn whosever they are, a prompt that never gives way, room
not given back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.job import PromptPart, Work
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.schedule import Schedule
from compute_node.engine.seat import Seat
from compute_node.engine.turn_length import TurnLength
from proto import errors


def new_schedule(most_sequences: int = 4, max_queued: int = 8) -> Schedule:
    return Schedule(max_queued, KvRoom(100, 1, 0, most_sequences))


async def results(compute: ComputeThread, work: Work) -> list[Any]:
    return [result async for _, result in compute.run(work, None)]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it never came true")


async def test_clients_share_the_thread_evenly_however_many_requests_each_has() -> None:
    spent, total, all_there = Counter[str](), 0, threading.Event()
    shares: list[dict[str, int]] = []

    def answer(client: str) -> Any:
        def run(_: Seat) -> Iterator[Any]:
            nonlocal total
            while not all_there.is_set():
                yield PromptPart(0)
            for number in range(200):
                time.sleep(0.0005)
                spent[client] += 1
                total += 1
                if total == 240:
                    shares.append(dict(spent))
                yield number

        return run

    with ComputeThread(new_schedule()) as compute:
        tasks = [
            asyncio.create_task(results(compute, Work(answer(client), client, 10)))
            for client in ("one", "two", "two", "two")
        ]
        await until(lambda: compute.schedule.num_alive + compute.schedule.num_queued == 4)
        all_there.set()
        assert [len(await task) for task in tasks] == [200] * 4
        await until(lambda: compute.schedule.is_empty)
    (share,) = shares
    assert share["one"] == pytest.approx(120, abs=40), share


async def test_a_prompt_gives_way_to_an_answer_that_has_waited_long_enough() -> None:
    layers_done, answered = 0, list[int]()

    def prompt(seat: Seat) -> Iterator[Any]:
        nonlocal layers_done
        for _ in range(40):
            time.sleep(0.005)
            layers_done += 1
            if seat.others_wait():
                seat.give_way()
        yield PromptPart(1)
        yield "first"

    def answer(_: Seat) -> Iterator[int]:
        number = 0
        while layers_done < 40:
            answered.append(layers_done)
            yield (number := number + 1)

    with ComputeThread(new_schedule(), max_stall_s=0.05) as compute:
        running = compute.run(Work(answer, "answer", 10), None)
        await anext(running)
        assert await results(compute, Work(prompt, "prompt", 10)) == ["first"]
        await running.aclose()  # type: ignore[attr-defined]
    during = {one for one in answered if 0 < one < 40}
    assert len(during) >= 3, "answers had turns between layers"


async def test_what_fits_no_more_waits_until_room_is_given_back() -> None:
    go_on = threading.Event()

    def hold(seat: Seat) -> Iterator[str]:
        while not go_on.wait(0.005):
            seat.check()
        yield "done"

    with ComputeThread(new_schedule(max_queued=1)) as compute:
        first = asyncio.create_task(results(compute, Work(hold, "a", 60)))
        await until(lambda: compute.schedule.num_alive == 1)
        second = asyncio.create_task(results(compute, Work(hold, "b", 60)))
        await until(lambda: compute.schedule.num_queued == 1)
        assert compute.schedule.num_alive == 1
        with pytest.raises(errors.QueueFull, match=r"retry in \d+ s"):
            await results(compute, Work(hold, "c", 1))
        go_on.set()
        assert await asyncio.wait_for(first, 10) == await asyncio.wait_for(second, 10) == ["done"]
        for _ in range(3):  # what was reserved came back
            assert await results(compute, Work(hold, "d", 100)) == ["done"]


def test_turns_are_as_short_as_the_misses_after_a_change_allow() -> None:
    resident, thrashing = TurnLength(lambda: 0.002, 16), TurnLength(lambda: 0.002, 16)
    assert resident.tokens == 16, "nothing is known yet"
    for place in range(16):
        resident.heard(place, 0, 0.02)
        thrashing.heard(place, 20 if place < 2 else 4, 0.02)
    assert resident.tokens == 1
    assert thrashing.tokens == 16
    for _ in range(200):
        for place in range(16):
            thrashing.heard(place, 5 if place < 2 else 4, 0.02)
    assert thrashing.tokens in (5, 6), "two misses a change cost 4 ms; a token may lose .8 ms"
