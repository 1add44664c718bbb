"""One stream of work to a worker, and a socket beside it for short messages. The main node's
compute thread asks and waits; threads of the link serve the stream, and connect again.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as StillWorking
from typing import Any

import grpc
from torch import Tensor

from compute_node.boxes.answer import Answer
from compute_node.boxes.channel import BoxChannel
from compute_node.boxes.direct_way import DirectWay
from compute_node.boxes.latency import Latency, slow_s
from compute_node.boxes.probe import Probe
from compute_node.boxes.rest import Rest
from compute_node.boxes.work import Work, tensor_of
from proto import direct_socket, errors, rpc
from proto import worker_pb2 as pb
from proto import worker_pb2_grpc as pb_grpc
from proto.direct_socket import SESSION_BYTES
from proto.expert import ModelSpec
from proto.held_experts import ALL_EXPERTS, HeldExperts
from proto.stats import counter, gauge

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_CALL_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_LONGEST_BEHIND_S = 30.0  # then the stream is opened anew
_REFUSALS = (errors.VersionMismatch, errors.OtherBits)
_WORK, _HELP = "flashmoe_node_worker_requests", "Work given to other boxes"
_BYTES, _BYTES_HELP = "flashmoe_node_worker_bytes", "Activations to and from other boxes"


class WorkerLink:
    """To one worker. Use as a context manager; it connects in the background, and again whenever
    the stream breaks. `ask` and `wait` are the compute thread's.

    A worker that is late gets no work until it has answered: whatever it were given would wait
    behind that, and so would the main node, once a layer. One that fails, or takes longer than the
    main node would by itself, three times in a row, is left alone for a while.

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
        spec: ModelSpec,
        probe: Probe,
        tls: rpc.TlsFiles | None = None,
        cost: float = 1.0,
    ) -> None:
        """cost: of an expert there, over what it is on the main node"""
        self.address, self.cost = address, cost
        self._spec, self._probe = spec, probe
        self._channel, self._tls = BoxChannel(address, tls), tls
        self._direct: DirectWay | None = None
        self._way_s = float("inf")  # there and back, at least
        self._requests: queue.SimpleQueue[pb.WorkRequest | None] = queue.SimpleQueue()
        self._open: dict[int, Answer] = {}
        self._lock = threading.Lock()
        self._number = 0
        self._behind_since_s: float | None = None  # a given-up answer has not come
        self.slots = 0  # experts that it holds at once; 0: it never joined
        self.held = ALL_EXPERTS  # those that its store has
        self._takes_work, self._closing = threading.Event(), threading.Event()
        self._rest = Rest(address)
        self._latency = {True: Latency(), False: Latency()}  # by whether it is a decode step
        self._refusal: errors.FlashMoEError | None = None  # why it is given no work
        self._replies: Any = None  # the open stream
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
        if self._behind_since_s is not None:
            self._look_for_late(self._behind_since_s)
        return self.is_joined and not self._rest

    @property
    def is_joined(self) -> bool:
        """Whether it answers, though it may rest."""
        return self._behind_since_s is None and self._takes_work.is_set()

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

    def ask(self, work: Work, own_s: float = 0.0) -> Answer:
        """Send it. Blocks for nothing. own_s: it takes the main node by itself; 0: not known"""
        late_s = self._latency_of(work).late_s(work.size)
        self._number += 1
        request = work.to_pb(self._number)
        answer = Answer(self._number, work, time.monotonic(), late_s, slow_s(own_s))
        answer.is_direct = self._direct is not None and DirectWay.takes(work)
        with self._lock:
            self._open[answer.number] = answer
        self._send(request, answer.is_direct)
        if not self._takes_work.is_set():
            self._fail_all("the stream broke")
        return answer

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        """Have it read these, ascending. Any thread; blocks for nothing, and nothing comes back."""
        request = pb.WorkRequest(layer=layer, experts=experts, prepares=True)
        self.num_prepared += len(experts)
        self._send(request, is_short=True)

    def wait(self, answer: Answer, check: Callable[[], None]) -> Tensor | None:
        """Its rows, as `made` of the work's sum gives them; None: it is late or failed, and the
        caller computes the work itself. check: called meanwhile; may raise
        """
        while True:
            check()
            late_in_s = answer.asked_s + answer.late_s - time.monotonic()
            try:
                rows = self._rows_of(answer, min(_POLL_S, max(0.0, late_in_s)))
            except StillWorking:
                if late_in_s <= 0 and self._give_up(answer):
                    return None
            except errors.FlashMoEError as error:
                self.refuse(error)
                return None
            else:
                self.num_answered += 1
                if answer.took_s > answer.slow_s:
                    self._rest.missed(answer.took_s)
                else:
                    self._rest.came()
                return rows

    def refuse(self, error: errors.FlashMoEError) -> None:
        """What it answered is no answer."""
        self.num_failed += 1
        logger.warning("worker failed", extra={"box": self.address, "reason": str(error)})
        self._rest.missed(0.0)

    def _send(self, request: pb.WorkRequest, is_short: bool) -> None:
        direct = self._direct
        if direct is None or not is_short:
            self.bytes_sent += request.ByteSize()
            self._requests.put(request)
            return
        data = request.SerializeToString()
        self.bytes_sent += len(data)
        direct.send(data)

    def _give_up(self, answer: Answer) -> bool:
        """False: it has come after all."""
        with self._lock:
            if answer.number not in self._open:
                return False
            answer.given_up = True
            if self._behind_since_s is None:
                self._behind_since_s = answer.asked_s
        self.num_late += 1
        facts = {"box": self.address, "late_s": round(answer.late_s, 3)}
        logger.warning("worker is late", extra=facts)
        self._rest.missed(answer.late_s)
        return True

    def _rows_of(self, answer: Answer, timeout_s: float) -> Tensor:
        """Raises TimeoutError, and what the worker failed with."""
        direct = self._direct
        if answer.is_direct and direct is not None and not answer.rows.done():
            direct.take_in(timeout_s)
            timeout_s = 0.0
        return answer.rows.result(timeout_s)

    def _look_for_late(self, since_s: float) -> None:
        """Whether what was given up has come. A stream whose worker has not answered for long ends;
        another may do better.
        """
        if (direct := self._direct) is not None:
            direct.look()
        if time.monotonic() - since_s > _LONGEST_BEHIND_S and self._replies is not None:
            self._replies.cancel()

    def _latency_of(self, work: Work) -> Latency:
        return self._latency[work.is_decode]

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            began_s = time.monotonic()
            try:
                self._serve(pb_grpc.WorkerStub(self._channel.now))
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
            self._channel.renew()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self, stub: pb_grpc.WorkerStub) -> None:
        """One stream, from its beginning to its end. Raises RpcError, VersionMismatch,
        MessageInvalid.
        """
        described = stub.Describe(pb.WorkerDescriptionRequest(), timeout=_CALL_S)
        if described.protocol_version != rpc.PROTOCOL_VERSION:
            raise errors.VersionMismatch(
                f"{self.address} speaks protocol {described.protocol_version}, this node "
                f"{rpc.PROTOCOL_VERSION}: update the older one"
            )
        if described.fingerprint != self._spec.fingerprint:
            raise errors.VersionMismatch(
                f"{self.address} has another model: give it a store of the same checkpoint"
            )
        held = HeldExperts.from_bytes(described.held, self._spec)
        requests = self._requests = queue.SimpleQueue()
        requests.put(pb.WorkRequest(session=(session := secrets.token_bytes(SESSION_BYTES))))
        replies = self._replies = stub.Compute(_until_none(requests))
        try:
            self._try_out(requests, replies)
            self._direct = self._new_direct(described.direct_port, session, replies.cancel)
            self._refusal = None
            self._rest.end()
            self.held, self.slots = held, described.slots
            self._takes_work.set()
            logger.info("worker joined", extra={"box": self.address, "slots": described.slots})
            for reply in replies:
                self._receive(reply)
        finally:
            requests.put(None)
            replies.cancel()
            if (direct := self._direct) is not None:
                self._direct = None
                direct.close()

    def _new_direct(
        self, port: int, session: bytes, broken: Callable[[], object]
    ) -> DirectWay | None:
        """None: there is none, or it cannot be reached, and all goes over the stream."""
        if not port or self.address.startswith("unix:"):
            return None
        try:
            connection = direct_socket.connect(self.address, port, session, self._tls)
        except errors.Unavailable as error:
            facts = {"box": self.address, "reason": str(error)}
            logger.warning("no short way to worker", extra=facts)
            return None
        return DirectWay(connection, self._receive, broken)

    def _try_out(self, requests: queue.SimpleQueue[Any], replies: Iterator[pb.WorkReply]) -> None:
        """Raises OtherBits, Unavailable, RpcError."""
        for work in self._probe.works:
            asked_s = time.monotonic()
            requests.put(work.to_pb(0))
            reply = next(replies, None)
            if reply is None:
                raise errors.Unavailable(f"{self.address} ended the stream")
            if reply.error:
                raise errors.Unavailable(f"{self.address} cannot compute: {reply.error}")
            self._probe.check(self.address, work, reply.rows)
            self._latency_of(work).tried(time.monotonic() - asked_s)

    def _receive(self, reply: pb.WorkReply, was_awaited: bool = True) -> None:
        with self._lock:
            answer = self._open.pop(reply.id, None)
            if not any(one.given_up for one in self._open.values()):
                self._behind_since_s = None
        if answer is None:  # of no request
            return
        self.bytes_received += reply.ByteSize()
        if reply.error:
            answer.rows.set_exception(errors.Unavailable(reply.error))
            return
        work, answer.took_s = answer.work, self._took_s(answer, reply, was_awaited)
        self._latency_of(work).heard(min(answer.took_s, answer.slow_s), work.size)
        try:
            num_rows = len(reply.rows) // work.hidden[:1].nbytes
            rows = tensor_of(reply.rows, work.hidden.dtype, num_rows)
        except errors.InvalidRequest as error:
            answer.rows.set_exception(error)
        else:
            answer.rows.set_result(rows)

    def _took_s(self, answer: Answer, reply: pb.WorkReply, was_awaited: bool) -> float:
        """From the question until the answer came: not until somebody looked, if nobody waited."""
        took_s, worker_s = time.monotonic() - answer.asked_s, 1e-6 * reply.took_us
        if was_awaited:
            self._way_s = min(self._way_s, took_s - worker_s)
            return took_s
        return min(took_s, worker_s + self._way_s)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            left, self._open = list(self._open.values()), {}
            self._behind_since_s = None
        for answer in left:
            answer.rows.set_exception(errors.Unavailable(why))


def _until_none(requests: queue.SimpleQueue[Any]) -> Iterator[pb.WorkRequest]:
    while (request := requests.get()) is not None:
        yield request


def _reason(error: Exception) -> str:
    return error.details() or str(error.code()) if isinstance(error, grpc.Call) else str(error)
