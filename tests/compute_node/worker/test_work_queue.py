"""Planted faults seen red: the order of arrival kept, more urgent work not found in the midst of a
prompt's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from compute_node.worker.work_queue import Urgency, WorkQueue


@pytest.fixture
def queue() -> Iterator[WorkQueue]:
    with WorkQueue() as queue:
        yield queue


def run(queue: WorkQueue) -> None:
    """Until there is nothing to do."""
    while queue.run_next(Urgency.PROMPT):
        pass


def test_the_most_urgent_comes_first_and_then_who_came_first(queue: WorkQueue) -> None:
    done = list[str]()
    queue.put(Urgency.PROMPT, partial(done.append, "prompt"))
    queue.put(Urgency.TOKEN, partial(done.append, "token 1"))
    queue.put(Urgency.TOKEN, partial(done.append, "token 2"))
    queue.put(Urgency.PREPARE, partial(done.append, "prepare"))
    run(queue)
    assert done == ["prepare", "token 1", "token 2", "prompt"]


def test_a_prompt_gives_way_to_what_is_more_urgent(queue: WorkQueue) -> None:
    done = list[str]()

    def prompt() -> None:
        done.append("begun")
        queue.put(Urgency.PROMPT, partial(done.append, "another prompt"))
        queue.put(Urgency.TOKEN, partial(done.append, "token"))
        while queue.run_next(Urgency.TOKEN):
            pass
        done.append("ended")

    queue.put(Urgency.PROMPT, prompt)
    run(queue)
    assert done == ["begun", "token", "ended", "another prompt"]


def test_a_watched_file_is_read_in_the_midst_of_work(queue: WorkQueue) -> None:
    """Seen red: files looked at between works alone."""
    ours, theirs = os.pipe()
    done = list[bytes]()

    def read() -> None:
        message = os.read(ours, 16)
        queue.put(Urgency.TOKEN, partial(done.append, message))

    def prompt() -> None:
        os.write(theirs, b"token")
        queue.run_next(Urgency.TOKEN)
        done.append(b"ended")

    try:
        queue.watch(ours, read)
        queue.put(Urgency.PROMPT, prompt)
        run(queue)
        assert done == [b"token", b"ended"]
        queue.forget(ours)
        os.write(theirs, b"unread")
        run(queue)
        assert len(done) == 2
    finally:
        os.close(ours)
        os.close(theirs)


class Drowsy(WorkQueue):
    """sleeps: it has nothing to do"""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps = threading.Event()

    def _look(self, timeout_s: float | None) -> None:
        if timeout_s is None:
            self.sleeps.set()
        super()._look(timeout_s)


def test_it_sleeps_until_there_is_work_and_ends_when_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen red: an error that ends the thread; a stop that nobody hears who sleeps."""
    done = threading.Event()
    with Drowsy() as queue:
        thread = threading.Thread(target=queue.run, daemon=True)
        thread.start()
        try:
            assert queue.sleeps.wait(20)
            queue.put(Urgency.TOKEN, partial(int, "none"))
            queue.put(Urgency.TOKEN, done.set)
            assert done.wait(20)
            queue.sleeps.clear()
            queue.put(Urgency.TOKEN, int)
            assert queue.sleeps.wait(20)
        finally:
            queue.stop()
            thread.join(10)
        assert not thread.is_alive() and "invalid literal" in caplog.text
