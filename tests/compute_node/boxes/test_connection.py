"""The connection to another box: a stream is opened again whenever it ends, and left at once.

Planted faults seen red: an end that ends the thread, a refusal that is waited out, one that is kept
after another end, a stream that stays open on leaving, a call by a channel that was closed,
a box still of use after its stream.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from compute_node.boxes.connection import BoxConnection, opened
from proto import errors
from proto import worker_pb2 as pb
from proto.worker_pb2_grpc import WorkerServicer, WorkerStub, add_WorkerServicer_to_server
from tests.stack import wait_for


class Worker(WorkerServicer):
    """Answers every request of a stream with its number."""

    def Compute(
        self, requests: Iterator[pb.WorkRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.WorkReply]:
        for request in requests:
            if request.id == 99:
                return
            yield pb.WorkReply(id=request.id)


class Counts:
    """before: what happens before a stream is opened, by the number of the attempt"""

    def __init__(self, before: Callable[[int], None] = lambda attempt: None) -> None:
        self.connection: BoxConnection[WorkerStub] | None = None
        self.requests: queue.SimpleQueue[pb.WorkRequest | None] = queue.SimpleQueue()
        self.num_begun, self.num_ended = 0, 0
        self.replies: list[int] = []
        self._before = before

    def serve(self, stub: WorkerStub) -> None:
        self.num_begun += 1
        self._before(self.num_begun)
        self.requests = queue.SimpleQueue()
        with opened(stub.Compute, self.requests) as replies:
            assert self.connection is not None
            self.connection.is_up.set()
            for reply in replies:
                self.replies.append(reply.id)

    def ended(self) -> None:
        assert self.connection is not None and not self.connection.is_up.is_set()
        self.num_ended += 1


@contextmanager
def connected(counts: Counts) -> Iterator[BoxConnection[WorkerStub]]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_WorkerServicer_to_server(Worker(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        counts.connection = BoxConnection("worker", address, None, WorkerStub, counts)
        with counts.connection as connection:
            yield connection
    finally:
        server.stop(0).wait()


def test_a_stream_that_ends_is_opened_again() -> None:
    counts = Counts()
    with connected(counts) as connection:
        for number in (1, 2):
            assert connection.wait_up(20) and counts.num_begun == number
            counts.requests.put(pb.WorkRequest(id=number))
            wait_for(lambda: len(counts.replies) == number, 20, "its reply")  # noqa: B023
            counts.requests.put(pb.WorkRequest(id=99))
            wait_for(lambda: counts.num_ended == number, 20, "its end")  # noqa: B023
    assert counts.replies == [1, 2]


def test_a_box_that_is_refused_is_named_at_once_and_asked_again() -> None:
    goes_on = threading.Event()

    def before(attempt: int) -> None:
        if attempt == 1:
            raise errors.VersionMismatch("another protocol")
        if attempt == 2:
            goes_on.wait(30)
            raise errors.Unavailable("not yet")

    counts = Counts(before)
    with connected(counts) as connection:
        began_s = time.monotonic()
        with pytest.raises(errors.VersionMismatch, match="another protocol"):
            connection.wait_up(60)
        assert time.monotonic() - began_s < 30
        goes_on.set()
        wait_for(lambda: counts.num_ended == 2, 20, "the second attempt")
        assert connection.wait_up(20) and counts.num_begun == 3


def test_one_that_is_not_of_use_is_not_waited_for_longer() -> None:
    stays = threading.Event()

    def before(attempt: int) -> None:
        stays.wait(60)

    with connected(Counts(before)) as connection:
        assert not connection.wait_up(0.1)
        threading.Timer(0.3, stays.set).start()  # its first call comes after the channel's end


def test_an_open_stream_is_left_at_once() -> None:
    counts = Counts()
    with connected(counts) as connection:
        assert connection.wait_up(20)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 8, "shorter than the wait for a thread that does not end"
    assert counts.num_ended == 1
    assert f"worker {connection.address}" not in {thread.name for thread in threading.enumerate()}
