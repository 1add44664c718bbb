"""The connection to a worker: a gRPC stream, a socket beside it for short messages, and a thread
that connects, tries the worker out, and connects again.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc

from compute_node.boxes.channel import BoxChannel
from compute_node.boxes.direct_way import DirectWay
from compute_node.boxes.probe import Probe
from compute_node.boxes.work import Work
from proto import direct_socket, errors, rpc
from proto import worker_pb2 as pb
from proto import worker_pb2_grpc as pb_grpc
from proto.direct_socket import SESSION_BYTES
from proto.expert import ModelSpec
from proto.held_experts import HeldExperts

logger = logging.getLogger(__name__)

_CALL_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_REFUSALS = (errors.VersionMismatch, errors.OtherBits)


class Hears(Protocol):
    """What becomes of the connection. Called on its thread; `heard` on that which looks, too."""

    def tried(self, work: Work, took_s: float) -> None:
        """It computed this of the probe with the right bits."""

    def joined(self, slots: int, held: HeldExperts) -> None:
        """slots: experts that it holds at once; held: those that its store has"""

    def heard(self, reply: pb.WorkReply, was_awaited: bool) -> None:
        """was_awaited: it came while somebody waited for it"""

    def ended(self) -> None:
        """What was asked is not answered any more."""


class WorkerStream:
    """Use as a context manager. Any thread.

    probe: what a worker must compute with the same bits before it joins
    """

    def __init__(
        self,
        address: str,
        spec: ModelSpec,
        probe: Probe,
        tls: rpc.TlsFiles | None,
        hears: Hears,
    ) -> None:
        self._address, self._spec, self._probe = address, spec, probe
        self._channel, self._tls, self._hears = BoxChannel(address, tls), tls, hears
        self._requests: queue.SimpleQueue[pb.WorkRequest | None] = queue.SimpleQueue()
        self._direct: DirectWay | None = None
        self._replies: Any = None  # of the open stream
        self._closing = threading.Event()
        self.takes_work = threading.Event()
        self.refusal: errors.FlashMoEError | None = None  # why it is given no work
        self._thread = threading.Thread(target=self._run, name=f"worker {address}", daemon=True)

    def __enter__(self) -> WorkerStream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._requests.put(None)
        self._channel.close()
        self._thread.join(_CALL_S)

    @property
    def direct(self) -> DirectWay | None:
        """The way for short messages, if there is one."""
        return self._direct

    def send(self, request: pb.WorkRequest, is_short: bool) -> int:
        """Blocks for nothing. Returns its bytes."""
        direct = self._direct
        if direct is None or not is_short:
            self._requests.put(request)
            return request.ByteSize()
        data = request.SerializeToString()
        direct.send(data)
        return len(data)

    def end(self) -> None:
        """And connect again."""
        if self._replies is not None:
            self._replies.cancel()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            began_s = time.monotonic()
            try:
                self._serve(pb_grpc.WorkerStub(self._channel.now))
            except (grpc.RpcError, errors.FlashMoEError) as error:
                self.refusal = error if isinstance(error, _REFUSALS) else None
                facts = {"box": self._address, "reason": _reason(error)}
                if not self._closing.is_set():
                    logger.warning("worker is away", extra=facts)
            self.takes_work.clear()
            self._hears.ended()
            if time.monotonic() - began_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._closing.wait(pause_s)
            self._channel.renew()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self, stub: pb_grpc.WorkerStub) -> None:
        """One stream, from its beginning to its end. Raises RpcError, VersionMismatch,
        MessageInvalid, OtherBits, Unavailable.
        """
        described = stub.Describe(pb.WorkerDescriptionRequest(), timeout=_CALL_S)
        self._check(described)
        held = HeldExperts.from_bytes(described.held, self._spec)
        requests = self._requests = queue.SimpleQueue()
        session = secrets.token_bytes(SESSION_BYTES)
        requests.put(pb.WorkRequest(session=session))
        replies = self._replies = stub.Compute(_until_none(requests))
        try:
            self._try_out(requests, replies)
            self._direct = self._new_direct(described.direct_port, session, replies.cancel)
            self.refusal = None
            self._hears.joined(described.slots, held)
            self.takes_work.set()
            logger.info("worker joined", extra={"box": self._address, "slots": described.slots})
            for reply in replies:
                self._hears.heard(reply, was_awaited=True)
        finally:
            requests.put(None)
            replies.cancel()
            if (direct := self._direct) is not None:
                self._direct = None
                direct.close()

    def _check(self, described: pb.WorkerDescription) -> None:
        """Raises VersionMismatch."""
        if described.protocol_version != rpc.PROTOCOL_VERSION:
            raise errors.VersionMismatch(
                f"{self._address} speaks protocol {described.protocol_version}, this node "
                f"{rpc.PROTOCOL_VERSION}: update the older one"
            )
        if described.fingerprint != self._spec.fingerprint:
            raise errors.VersionMismatch(
                f"{self._address} has another model: give it a store of the same checkpoint"
            )

    def _new_direct(
        self, port: int, session: bytes, broken: Callable[[], object]
    ) -> DirectWay | None:
        """None: there is none, or it cannot be reached, and all goes over the stream."""
        if not port or self._address.startswith("unix:"):
            return None
        try:
            connection = direct_socket.connect(self._address, port, session, self._tls)
        except errors.Unavailable as error:
            facts = {"box": self._address, "reason": str(error)}
            logger.warning("no short way to worker", extra=facts)
            return None
        return DirectWay(connection, self._hears.heard, broken)

    def _try_out(self, requests: queue.SimpleQueue[Any], replies: Iterator[pb.WorkReply]) -> None:
        """Raises OtherBits, Unavailable, RpcError."""
        for work in self._probe.works:
            asked_s = time.monotonic()
            requests.put(work.to_pb(0))
            reply = next(replies, None)
            if reply is None:
                raise errors.Unavailable(f"{self._address} ended the stream")
            if reply.error:
                raise errors.Unavailable(f"{self._address} cannot compute: {reply.error}")
            self._probe.check(self._address, work, reply.rows)
            self._hears.tried(work, time.monotonic() - asked_s)


def _until_none(requests: queue.SimpleQueue[Any]) -> Iterator[pb.WorkRequest]:
    while (request := requests.get()) is not None:
        yield request


def _reason(error: Exception) -> str:
    return error.details() or str(error.code()) if isinstance(error, grpc.Call) else str(error)
