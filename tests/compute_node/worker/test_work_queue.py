"""Planted faults seen red: the order of arrival kept, more urgent work not found in the midst of a
prompt's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from compute_node.worker.work_queue import Urgency, WorkQueue


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def test_the_most_urgent_comes_first_and_then_who_came_first(thread: ThreadPoolExecutor) -> None:
    queue, may_begin, done = WorkQueue(thread), threading.Event(), list[str]()
    thread.submit(may_begin.wait)
    queue.put(Urgency.PROMPT, partial(done.append, "prompt"))
    queue.put(Urgency.TOKEN, partial(done.append, "token 1"))
    queue.put(Urgency.TOKEN, partial(done.append, "token 2"))
    queue.put(Urgency.PREPARE, partial(done.append, "prepare"))
    may_begin.set()
    thread.submit(int).result()
    assert done == ["prepare", "token 1", "token 2", "prompt"]


def test_a_prompt_gives_way_to_what_is_more_urgent(thread: ThreadPoolExecutor) -> None:
    queue, done = WorkQueue(thread), list[str]()

    def prompt() -> None:
        done.append("begun")
        queue.put(Urgency.PROMPT, partial(done.append, "another prompt"))
        queue.put(Urgency.TOKEN, partial(done.append, "token"))
        while queue.run_next(Urgency.TOKEN):
            pass
        done.append("ended")

    queue.put(Urgency.PROMPT, prompt)
    thread.submit(int).result()  # the prompt's; what it put in comes after
    thread.submit(int).result()
    assert done == ["begun", "token", "ended", "another prompt"]
