"""The stream to a worker: it is tried out when it opens, and short messages go over a socket beside
it.
"""

from __future__ import annotations

import logging
import queue
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from compute_node.boxes.connection import CALL_S, BoxConnection, opened
from compute_node.boxes.direct_way import DirectWay
from compute_node.boxes.probe import Probe
from compute_node.boxes.work import Work
from proto import direct_socket, errors, rpc
from proto import worker_pb2 as pb
from proto import worker_pb2_grpc as pb_grpc
from proto.direct_socket import SESSION_BYTES
from proto.expert import ModelSpec
from proto.held_experts import HeldExperts
from proto.protocol import check_version

logger = logging.getLogger(__name__)


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
        self._tls, self._hears = tls, hears
        self._connection = BoxConnection("worker", address, tls, pb_grpc.WorkerStub, self)
        self._requests: queue.SimpleQueue[pb.WorkRequest | None] = queue.SimpleQueue()
        self._direct: DirectWay | None = None
        self._replies: Any = None  # of the open stream

    def __enter__(self) -> WorkerStream:
        self._connection.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__()

    @property
    def takes_work(self) -> bool:
        return self._connection.is_up.is_set()

    def wait_up(self, timeout_s: float) -> bool:
        """Whether it takes work by then. Raises VersionMismatch, OtherBits."""
        return self._connection.wait_up(timeout_s)

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

    def serve(self, stub: pb_grpc.WorkerStub) -> None:
        """Raises RpcError, VersionMismatch, MessageInvalid, OtherBits, Unavailable."""
        described = stub.Describe(pb.WorkerDescriptionRequest(), timeout=CALL_S)
        self._check(described)
        held = HeldExperts.from_bytes(described.held, self._spec)
        requests = self._requests = queue.SimpleQueue()
        session = secrets.token_bytes(SESSION_BYTES)
        requests.put(pb.WorkRequest(session=session))
        with opened(stub.Compute, requests) as replies:
            self._replies = replies
            self._try_out(requests, replies)
            self._direct = self._new_direct(described.direct_port, session, replies.cancel)
            self._hears.joined(described.slots, held)
            self._connection.is_up.set()
            logger.info("worker joined", extra={"box": self._address, "slots": described.slots})
            for reply in replies:
                self._hears.heard(reply, was_awaited=True)

    def ended(self) -> None:
        if (direct := self._direct) is not None:
            self._direct = None
            direct.close()
        self._hears.ended()

    def _check(self, described: pb.WorkerDescription) -> None:
        """Raises VersionMismatch."""
        check_version(self._address, described.protocol_version)
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
