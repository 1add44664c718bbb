"""A link to a worker that does everything wrong, over its stream alone and over the short way
beside it: the main node computes by itself, and nothing hangs or leaks.

Planted faults seen red: a late answer kept for ever, a box asked again while it is late, one that
is never asked again, a slow one asked on and on, a stream that ends within the probe ending the
link, rows that are none ending it, a box that fails asked on and on.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import grpc
import pytest
import torch

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Rotation, Shares
from compute_node.boxes.probe import Probe
from compute_node.boxes.work import Work, bytes_of, tensor_of
from compute_node.cache.asked import never
from compute_node.worker.direct_door import DirectDoor
from compute_node.worker.direct_way import DirectWay
from compute_node.worker.sessions import Sessions
from compute_node.worker.work_queue import WorkQueue
from proto import errors
from proto import worker_pb2 as pb
from proto.direct_socket import DirectSocket
from proto.expert import ModelSpec
from proto.protocol import PROTOCOL_VERSION
from proto.rpc import Listen
from proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tests.stack import wait_for

SPEC = ModelSpec("f", "toy", (0, 2), 4, 2, {0: (), 2: ()})
Reply = Callable[[pb.WorkRequest], pb.WorkReply | None]
WORK = Work.of(0, [1], torch.ones(1, 8), torch.tensor([[1, 2]]), torch.ones(1, 2))


def doubled(work: Work) -> torch.Tensor:
    return work.hidden * 2


def right(request: pb.WorkRequest) -> pb.WorkReply:
    hidden = tensor_of(request.hidden, torch.float32, request.num_tokens)
    return pb.WorkReply(id=request.id, rows=bytes_of(hidden * 2))


class Worker(WorkerServicer):
    """reply: of a request that is not of the probe; None: never. num_probed: before it ends the
    stream
    """

    def __init__(self) -> None:
        self.reply: Reply = right
        self.num_probed, self.num_streams = 1 << 30, 0
        self.fingerprint, self.held = "f", b""
        self.direct_port, self.num_direct = 0, 0
        self.sessions = Sessions()

    def Describe(self, request: Any, context: Any) -> pb.WorkerDescription:
        return pb.WorkerDescription(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=self.fingerprint,
            slots=5,
            held=self.held,
            direct_port=self.direct_port,
        )

    def Compute(self, requests: Iterator[pb.WorkRequest], context: Any) -> Iterator[pb.WorkReply]:
        self.num_streams += 1
        session = next(requests).session
        self.sessions.begin(session, threading.Event())
        try:
            for number, request in enumerate(requests):
                if number >= self.num_probed:
                    return
                is_probe = request.id == 0 and not request.prepares
                found = right(request) if is_probe else self.reply(request)
                if found is not None:
                    yield found
        finally:
            self.sessions.end(session)

    @contextmanager
    def direct(self) -> Iterator[None]:
        """Short messages are answered on the way that a worker has for them, for the block."""

        def do(request: pb.WorkRequest, came_s: float) -> pb.WorkReply | None:
            self.num_direct += 1
            return self.reply(request)

        def take_in(connection: DirectSocket, session: bytes) -> bool:
            return self.sessions.take_in(
                session, lambda gone: DirectWay(connection, queue, do, never)
            )

        with WorkQueue() as queue, ThreadPoolExecutor(1) as thread:
            running = thread.submit(queue.run)
            try:
                with DirectDoor(Listen("127.0.0.1:0"), 0, take_in) as door:
                    self.direct_port = door.port
                    yield
            finally:
                self.direct_port = 0
                queue.stop()
                running.result()


@contextmanager
def linked(worker: Worker, probe: Probe | None = None, way: str = "stream") -> Iterator[WorkerLink]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_WorkerServicer_to_server(worker, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    with worker.direct() if way == "direct" else nullcontext():
        server.start()
        try:
            probe = probe or Probe.of(doubled, SPEC, 8, torch.float32)
            with WorkerLink(address, SPEC, probe) as link:
                yield link
        finally:
            server.stop(0).wait()


@pytest.fixture(params=["stream", "direct"])
def way(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_what_it_answers_is_taken(way: str) -> None:
    worker = Worker()
    with linked(worker, way=way) as link:
        assert link.wait_up(10) and link.is_up and link.slots == 5
        for _ in range(20):
            rows = link.wait(link.ask(WORK), never)
            assert rows is not None and torch.equal(rows, WORK.hidden * 2)
        assert (link.num_answered, link.num_late, link.num_failed) == (20, 0, 0)
        assert link.bytes_sent > 20 * 32 < link.bytes_received
        assert worker.num_direct == (20 if way == "direct" else 0)


def test_an_answer_that_needs_no_read_comes_soon(way: str) -> None:
    """Planted faults seen red: one that is never soon, and one that always is."""
    worker, go_on = Worker(), threading.Event()
    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        first = link.ask(WORK)
        assert link.wait(first, never) is not None
        link.times.way_s = 5.0  # whatever this machine takes
        answer = link.ask(WORK)
        answer.late_s = 60.0
        assert link.comes_soon(answer) and answer.rows.done() and link.need_not_wait(answer)

        def reply(request: pb.WorkRequest) -> pb.WorkReply:
            go_on.wait(20)
            return right(request)

        worker.reply, link.times.way_s = reply, 0.05
        answer = link.ask(WORK)
        answer.late_s = 60.0
        assert not link.comes_soon(answer) and not link.need_not_wait(answer)
        go_on.set()
        wait_for(lambda: link.need_not_wait(answer), 20, "the answer")
        assert link.wait(answer, never) is not None
        answer.late_s, link.times.way_s = 0.2, float("inf")
        assert link.comes_soon(link.ask(WORK)), "it is not known how long one takes"


def test_what_is_long_goes_over_the_stream() -> None:
    worker, num_tokens = Worker(), 1 << 14
    hidden, ids = torch.ones(num_tokens, 8), torch.tensor([[1, 2]]).repeat(num_tokens, 1)
    long = Work.of(0, [1], hidden, ids, ids.float())
    with linked(worker, way="direct") as link:
        assert link.wait_up(10)
        first, second = link.ask(long), link.ask(WORK)
        for answer in (second, first):
            rows = link.wait(answer, never)
            assert rows is not None and torch.equal(rows, answer.work.hidden * 2)
        assert worker.num_direct == 1


def test_an_answer_that_nobody_waited_for_took_no_longer_than_it_did() -> None:
    """The main node computed meanwhile. Planted fault seen red: until somebody looked."""
    with linked(Worker(), way="direct") as link:
        assert link.wait_up(10)
        assert link.wait(link.ask(WORK), never) is not None
        answer, direct = link.ask(WORK), link._stream.direct
        assert direct is not None and direct._connection.wait(10)
        threading.Event().wait(0.5)
        assert link.wait(answer, never) is not None
        assert answer.took_s < 0.4


def test_a_port_that_cannot_be_reached_leaves_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker.direct_port = taken.getsockname()[1]
    with linked(worker) as link:
        assert link.wait_up(10) and link.wait(link.ask(WORK), never) is not None
    assert "no short way to worker" in caplog.text


@pytest.mark.parametrize(
    "said", [b"", b"\xff" * 8, b"\x03\0\0\0abc"], ids=["hung up", "too long", "no reply"]
)
def test_a_short_way_that_breaks_ends_the_stream(said: bytes) -> None:
    """The link connects again."""
    worker = Worker()
    with linked(worker, way="direct") as link:
        assert link.wait_up(10)
        wait_for(lambda: worker.sessions._ways, 10, "the worker to let it in")
        [connection] = [way._connection for way in worker.sessions._ways.values()]
        worker.reply = lambda _: None
        answer = link.ask(WORK)
        if said:
            connection._socket.send(said)
        else:
            connection.hang_up()
        assert link.wait(answer, never) is None
        worker.reply = right
        wait_for(lambda: worker.num_streams == 2 and link.is_up, 20, "another stream")
        assert link.wait(link.ask(WORK), never) is not None


def test_a_box_is_asked_for_what_its_store_has() -> None:
    """Written against: what it has not heard, an expert of another layer taken for it, a
    list of another size taken.
    """
    worker = Worker()
    worker.held = bytes([0b00000011])  # of layer 0 the first two of four
    with linked(worker) as link:
        assert link.wait_up(10)
        boxes = Boxes(lambda slots, held: Shares(SPEC.num_experts, slots, held), 5)
        boxes.links = [link]
        asked = {(layer, e) for layer in (0, 2) for e in range(4) if boxes.shares(layer, [e])}
        assert len(asked) == 1 and asked < {(0, 0), (0, 1)}
    worker.held = bytes([0b11, 0])
    with linked(worker) as link:
        assert not link.wait_up(1) and not link.is_up


def test_what_is_prepared_is_sent_and_nothing_comes_back(way: str) -> None:
    """Planted fault seen red: nothing sent."""
    worker, heard = Worker(), list[pb.WorkRequest]()

    def reply(request: pb.WorkRequest) -> pb.WorkReply | None:
        heard.append(request)
        return None if request.prepares else right(request)

    worker.reply = reply
    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        boxes = Boxes(lambda slots, held: Rotation(SPEC.moe_layers, slots, 1, held), 4)
        boxes.prepare(2, [3])
        boxes.links = [link]
        boxes.prepare(2, [3, 1])
        assert link.wait(link.ask(WORK), never) is not None
        first = heard[0]
        assert (first.layer, list(first.experts), first.prepares) == (2, [1, 3], True)
        assert len(heard) == 2 and link.num_prepared == 2


def test_a_box_that_is_late_gets_no_work_until_it_has_answered(way: str) -> None:
    """Whatever came before, one late answer is all that a box which stands still costs."""
    worker, go_on = Worker(), threading.Event()
    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        for _ in range(32):
            assert link.wait(link.ask(WORK), never) is not None

        def reply(request: pb.WorkRequest) -> pb.WorkReply:
            go_on.wait(20)
            return right(request)

        worker.reply = reply
        began_s = time.monotonic()
        assert link.is_up and link.wait(link.ask(WORK), never) is None
        assert time.monotonic() - began_s < 2
        assert not link.is_up and link.num_late == 1
        go_on.set()
        wait_for(lambda: link.is_up, 10, "the late answer")
        assert not link._open and link.wait(link.ask(WORK), never) is not None


def test_a_box_that_is_slower_than_the_main_node_rests(way: str) -> None:
    """Its answers come in time, by what it took before."""
    worker = Worker()

    def reply(request: pb.WorkRequest) -> pb.WorkReply:
        time.sleep(0.11)
        return right(request)

    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        worker.reply = reply
        for _ in range(3):
            assert link.is_up and link.wait(link.ask(WORK), never) is not None
        for _ in range(3):
            assert link.is_up and link.wait(link.ask(WORK, own_s=0.01), never) is not None
        assert not link.is_up and link.num_late == 0


def test_a_stream_without_an_answer_for_long_is_opened_anew(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker()
    monkeypatch.setattr("compute_node.boxes.link._LONGEST_BEHIND_S", 0.1)
    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        worker.reply = lambda _: None
        assert link.wait(link.ask(WORK), never) is None
        worker.reply = right
        wait_for(lambda: link.is_up, 10, "another stream")
        assert worker.num_streams == 2 and not link._open


@pytest.mark.parametrize(
    "reply",
    [
        lambda request: pb.WorkReply(id=request.id, error="the disk is damaged"),
        lambda request: pb.WorkReply(id=request.id),
        lambda request: pb.WorkReply(id=request.id, rows=bytes(7)),
    ],
    ids=["error", "nothing", "no rows"],
)
def test_a_box_that_fails_rests(way: str, reply: Reply) -> None:
    worker = Worker()
    worker.reply = reply
    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        for _ in range(3):
            assert link.is_up
            assert link.wait(link.ask(WORK), never) is None
        assert not link.is_up and link.num_failed == 3


def test_a_stream_that_ends_is_opened_again() -> None:
    worker = Worker()
    worker.num_probed = 3
    with linked(worker) as link:
        wait_for(lambda: worker.num_streams >= 2, 10, "the link to try again")
        assert not link.is_up
        worker.num_probed = 1 << 30
        assert link.wait_up(20)


def test_another_model_and_other_bits_are_refused() -> None:
    worker = Worker()
    worker.fingerprint = "g"
    with linked(worker) as link, pytest.raises(errors.VersionMismatch, match="another"):
        link.wait_up(10)
    other = Probe.of(lambda work: work.hidden * 3, SPEC, 8, torch.float32)
    with (
        linked(Worker(), other) as link,
        pytest.raises(errors.OtherBits, match=r"127\.0\.0\.1:.* computes"),
    ):
        link.wait_up(10)


def test_who_waits_may_leave(way: str) -> None:
    worker = Worker()
    worker.reply = lambda _: None

    def leave() -> None:
        raise errors.Cancelled("the caller went away")

    with linked(worker, way=way) as link:
        assert link.wait_up(10)
        with pytest.raises(errors.Cancelled):
            link.wait(link.ask(WORK), leave)
