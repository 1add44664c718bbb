"""One stream of work to a worker. The main node's compute thread asks and waits; threads of the
link send, receive, and connect again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillWorking
from dataclasses import dataclass, field
from typing import Any

import grpc
from torch import Tensor

from compute_node.boxes.latency import Latency
from compute_node.boxes.probe import Probe
from compute_node.boxes.work import Work, tensor_of
from proto import errors, rpc
from proto import worker_pb2 as pb
from proto import worker_pb2_grpc as pb_grpc
from proto.stats import counter, gauge

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_CALL_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_MOST_MISSED = 3  # answers in a row, then it is left alone for a while
_REFUSALS = (errors.VersionMismatch, errors.OtherBits)
_WORK, _HELP = "flashmoe_node_worker_requests", "Work given to other boxes"
_BYTES, _BYTES_HELP = "flashmoe_node_worker_bytes", "Activations to and from other boxes"


@dataclass(eq=False)
class Answer:
    """Of a worker, to be waited for."""

    number: int
    work: Work
    asked_s: float
    late_s: float
    rows: Future[Tensor] = field(default_factory=Future)


class WorkerLink:
    """To one worker. Use as a context manager; it connects in the background, and again whenever
    the stream breaks. `ask` and `wait` are the compute thread's.

    probe: what a worker must compute with the same bits before it is given work
    """

    num_answered: int = counter(_WORK, _HELP, key="answered", outcome="answered")
    num_late: int = counter(_WORK, _HELP, key="late", outcome="late")
    num_failed: int = counter(_WORK, _HELP, key="failed", outcome="failed")
    num_prepared: int = counter(
        "flashmoe_node_worker_prepared",
        "Experts that boxes were asked to read ahead",
        key="prepared",
    )
    bytes_sent: int = counter(_BYTES, _BYTES_HELP, key="bytes_sent", way="sent")
    bytes_received: int = counter(_BYTES, _BYTES_HELP, key="bytes_received", way="received")

    def __init__(
        self,
        address: str,
        fingerprint: str,
        probe: Probe,
        tls: rpc.TlsFiles | None = None,
    ) -> None:
        self.address = address
        self._fingerprint, self._probe = fingerprint, probe
        self._channel = rpc.connect(address, tls)
        self._stub = pb_grpc.WorkerStub(self._channel)
        self._requests: queue.SimpleQueue[pb.WorkRequest | None] = queue.SimpleQueue()
        self._open: dict[int, Answer] = {}
        self._lock = threading.Lock()
        self._number = self._num_missed_in_a_row = 0
        self.slots = 0  # experts that it holds at once; 0: it never joined
        self._takes_work, self._closing = threading.Event(), threading.Event()
        self._rested_s = 0.0
        self._latency = {True: Latency(), False: Latency()}  # by whether it is one token
        self._refusal: errors.FlashMoEError | None = None  # why it is given no work
        self._thread = threading.Thread(target=self._run, name=f"worker {address}", daemon=True)

    def __enter__(self) -> WorkerLink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._requests.put(None)
        self._channel.close()
        self._thread.join(_CALL_S)

    @property
    @gauge("flashmoe_node_worker_up", "Whether a box is given work", key="up")
    def is_up(self) -> bool:
        return self._takes_work.is_set() and time.monotonic() >= self._rested_s

    def wait_up(self, timeout_s: float) -> bool:
        """Whether it takes work by then. Raises what it is refused for: VersionMismatch,
        OtherBits.
        """
        end_s = time.monotonic() + timeout_s
        while not self._takes_work.wait(_POLL_S):
            if self._refusal is not None:
                raise self._refusal
            if time.monotonic() > end_s:
                return False
        return True

    def ask(self, work: Work) -> Answer:
        """Send it. Blocks for nothing."""
        latency = self._latency[len(work.hidden) == 1]
        self._number += 1
        request = work.to_pb(self._number)
        answer = Answer(self._number, work, time.monotonic(), latency.late_s)
        with self._lock:
            self._open[answer.number] = answer
        self.bytes_sent += request.ByteSize()
        self._requests.put(request)
        if not self._takes_work.is_set():
            self._fail_all("the stream broke")
        return answer

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        """Have it read these, ascending. Any thread; blocks for nothing, and nothing comes back."""
        request = pb.WorkRequest(layer=layer, experts=experts, prepares=True)
        self.num_prepared += len(experts)
        self.bytes_sent += request.ByteSize()
        self._requests.put(request)

    def wait(self, answer: Answer, check: Callable[[], None]) -> Tensor | None:
        """Its rows, as `made` of the work's sum gives them; None: it is late or failed, and the
        caller computes the work itself. check: called meanwhile; may raise
        """
        while True:
            check()
            late_in_s = answer.asked_s + answer.late_s - time.monotonic()
            try:
                rows = answer.rows.result(min(_POLL_S, max(0.0, late_in_s)))
            except StillWorking:
                if late_in_s <= 0:
                    self._late(answer)
                    return None
            except errors.FlashMoEError as error:
                self.refuse(error)
                return None
            else:
                self._latency[len(answer.work.hidden) == 1].heard(time.monotonic() - answer.asked_s)
                self.num_answered += 1
                self._num_missed_in_a_row = 0
                return rows

    def refuse(self, error: errors.FlashMoEError) -> None:
        """What it answered is no answer."""
        self.num_failed += 1
        logger.warning("worker failed", extra={"box": self.address, "reason": str(error)})
        self._missed()

    def _late(self, answer: Answer) -> None:
        with self._lock:
            self._open.pop(answer.number, None)
        self.num_late += 1
        self._latency[len(answer.work.hidden) == 1].heard(answer.late_s)
        self._missed()

    def _missed(self) -> None:
        """A box that misses several times in a row is left alone for a while."""
        self._num_missed_in_a_row += 1
        if self._num_missed_in_a_row >= _MOST_MISSED:
            self._rested_s = time.monotonic() + _LONGEST_PAUSE_S
            self._num_missed_in_a_row = 0
            logger.warning("worker rests", extra={"box": self.address, "for_s": _LONGEST_PAUSE_S})

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            began_s = time.monotonic()
            try:
                self._serve()
            except (grpc.RpcError, errors.FlashMoEError) as error:
                self._refusal = error if isinstance(error, _REFUSALS) else None
                facts = {"box": self.address, "reason": _reason(error)}
                if not self._closing.is_set():
                    logger.warning("worker is away", extra=facts)
            self._takes_work.clear()
            self._fail_all("the stream broke")
            if time.monotonic() - began_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self) -> None:
        """One stream, from its beginning to its end. Raises RpcError, VersionMismatch."""
        described = self._stub.Describe(pb.WorkerDescriptionRequest(), timeout=_CALL_S)
        if described.protocol_version != rpc.PROTOCOL_VERSION:
            raise errors.VersionMismatch(
                f"{self.address} speaks protocol {described.protocol_version}, this node "
                f"{rpc.PROTOCOL_VERSION}: update the older one"
            )
        if described.fingerprint != self._fingerprint:
            raise errors.VersionMismatch(
                f"{self.address} has another model: give it a store of the same checkpoint"
            )
        requests = self._requests = queue.SimpleQueue()
        replies = self._stub.Compute(_until_none(requests))
        try:
            self._try_out(requests, replies)
            self._refusal, self.slots = None, described.slots
            self._takes_work.set()
            logger.info("worker joined", extra={"box": self.address, "slots": described.slots})
            for reply in replies:
                self._receive(reply)
        finally:
            requests.put(None)
            replies.cancel()

    def _try_out(self, requests: queue.SimpleQueue[Any], replies: Iterator[pb.WorkReply]) -> None:
        """Raises OtherBits, Unavailable, RpcError."""
        for work in self._probe.works:
            requests.put(work.to_pb(0))
            reply = next(replies, None)
            if reply is None:
                raise errors.Unavailable(f"{self.address} ended the stream")
            if reply.error:
                raise errors.Unavailable(f"{self.address} cannot compute: {reply.error}")
            self._probe.check(self.address, work, reply.rows)

    def _receive(self, reply: pb.WorkReply) -> None:
        with self._lock:
            answer = self._open.pop(reply.id, None)
        if answer is None:  # it was given up
            return
        self.bytes_received += reply.ByteSize()
        if reply.error:
            answer.rows.set_exception(errors.Unavailable(reply.error))
            return
        try:
            num_rows = len(reply.rows) // (answer.work.hidden[:1].nbytes)
            rows = tensor_of(reply.rows, answer.work.hidden.dtype, num_rows)
        except errors.InvalidRequest as error:
            answer.rows.set_exception(error)
        else:
            answer.rows.set_result(rows)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            left, self._open = list(self._open.values()), {}
        for answer in left:
            answer.rows.set_exception(errors.Unavailable(why))


def _until_none(requests: queue.SimpleQueue[Any]) -> Iterator[pb.WorkRequest]:
    while (request := requests.get()) is not None:
        yield request


def _reason(error: Exception) -> str:
    return error.details() or str(error.code()) if isinstance(error, grpc.Call) else str(error)
