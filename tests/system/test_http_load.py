"""The gateway under more connections than the node takes, and while daemons are killed: every
request ends with the tokens of an undisturbed one, or with an error that its client understands.

It is there for: a stream that fails and still ends with [DONE], and generations that go on when
their client has left.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.http_load import Outcomes, held, load, undisturbed
from tests.stack import ServedStack, served, wait_for

pytestmark = pytest.mark.system
SECONDS, CONNECTIONS = 8.0, 200
_LEAK_MIB = 8.0  # what an allocator keeps of 200 connections at once


@pytest.fixture
def stack(tiny_store: Path, run_dir: Path) -> Iterator[ServedStack]:
    with served(tiny_store, run_dir, "--http", "0", "--experts-memory=100%") as found:
        yield found


def test_two_hundred_connections_on_a_queue_of_sixteen(stack: ServedStack) -> None:
    expected = undisturbed(stack)
    asyncio.run(load(stack.url, expected, 4.0, CONNECTIONS))  # what stays allocated is there then
    wait_for(lambda: held(stack)[0] < 60, 10, "connections to close")
    before = held(stack)
    outcomes = asyncio.run(load(stack.url, expected, SECONDS, CONNECTIONS))
    assert outcomes.wrong == []
    assert outcomes.by_kind["equal"] > 0
    assert outcomes.by_kind["429"] > 0
    assert outcomes.by_kind.keys() <= {"equal", "429"}
    wait_for(lambda: held(stack)[0] <= before[0], 10, "descriptors to come back")
    assert held(stack)[1] < before[1] + _LEAK_MIB
    with stack.client() as node:
        wait_for(lambda: node.stats().live == node.stats().queued == 0, 10, "the node to rest")


@pytest.mark.parametrize("victim", ["compute_node", "gateway", "expert_store"])
def test_a_killed_daemon_loses_no_request_silently(stack: ServedStack, victim: str) -> None:
    expected, outcomes, over = undisturbed(stack), Outcomes(), threading.Event()
    breaks = victim == "gateway"

    def run() -> None:
        asyncio.run(load(stack.url, expected, over, 8, breaks, outcomes))

    def answers() -> bool:
        return asyncio.run(load(stack.url, expected, 0.5, 1, True)).by_kind["equal"] > 0

    loading = threading.Thread(target=run)
    loading.start()
    try:
        wait_for(lambda: outcomes.by_kind["equal"] > 0, 60, "a first answer")
        stack.kill(victim)
        wait_for(answers, 60, "answers after the restart")
    finally:
        over.set()
        loading.join()
    assert outcomes.wrong == []
