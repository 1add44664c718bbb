"""One open stream to the store: its lock, its memory, and the exchanges it carries. Blocking, for
one thread.

A session that breaks takes every lease with it.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from compute_node.store.local_socket import HungUp, LocalSocket
from compute_node.store.memory import Borrowed, ExpertMemory, PrivateMemory, SegmentMemory
from proto import errors
from proto import expert_store_pb2 as pb
from proto.expert import EXACT_VARIANT, ModelSpec, RecordKey
from proto.held_experts import ALL_EXPERTS, HeldExperts
from proto.protocol import PROTOCOL_VERSION
from proto.stats import fact

_POLL_S = 0.05
_OPEN_S = 10.0
_CHUNKED_AT_ONCE = 2  # records on their way: one is read while the other is sent


logger = logging.getLogger(__name__)


class SessionLost(errors.Unavailable):
    """The stream to the store broke: every lease is gone."""


@dataclass(frozen=True)
class StoreDescription:
    """What the store says of itself.

    num_spare: slots never lent by quota, where prefetched experts wait
    piece_bytes: the longest read
    lease_bytes: by variant, what a lease of its records counts against the quota
    held: the experts that it has
    config: the checkpoint's config.json; empty: it has none
    share: which share of the model it is; empty: it is whole
    """

    spec: ModelSpec
    model_dir: Path
    slot_bytes: int
    num_slots: int
    num_spare: int
    piece_bytes: int
    lease_bytes: dict[str, int]
    held: HeldExperts = ALL_EXPERTS
    config: bytes = b""
    share: str = fact("which share of the model the store is; empty: it is whole", start="")

    @property
    def num_experts(self) -> int:
        """That the store has."""
        return self.held.num(self.spec)

    def check_whole(self) -> None:
        """Raises ManifestInvalid for a store that has only a share of the experts."""
        if not self.held.is_all:
            raise errors.ManifestInvalid(
                f"the store has {self.num_experts} of {self.spec.num_experts_total} experts: give "
                "a store that has all, or name workers that have the rest"
            )


class StoreSession:
    """One open stream, its lock, and the memory its leases point into.

    Exchanges go over the store's local socket where both ends share the host, else over the stream.
    Chunks are put in place by the thread that receives them, as they come: what waits for the
    computing thread takes no memory beside the slots.
    """

    def __init__(self, lock: _Lock | None, description: StoreDescription) -> None:
        self._call: Any = None
        self._lock = lock
        self._spec = description.spec
        self._lease_bytes = description.lease_bytes
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[pb.SessionReply | Exception] = queue.SimpleQueue()
        self._answers: dict[int, deque[pb.Exchanged]] = {}
        self._ids = itertools.count(1)
        self._local_socket: LocalSocket | None = None
        self.broken = False
        self.memory: ExpertMemory
        self._private: PrivateMemory | None = None  # with chunks

    @classmethod
    def open(
        cls,
        stub: Any,
        node: str,
        num_slots: int,
        session_dir: Path | None,
        description: StoreDescription,
    ) -> StoreSession:
        """num_slots: exact experts that may be borrowed at once

        Raises grpc.RpcError, Unavailable, SegmentInvalid, SlotsExhausted, VersionMismatch."""
        lock = _Lock(session_dir, node) if session_dir is not None else None
        session = cls(lock, description)
        session._call = stub.Session(iter(session._requests.get, None))
        at_once = num_slots if lock else min(_CHUNKED_AT_ONCE, num_slots)
        opening = pb.Open(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=description.spec.fingerprint,
            node=node,
            quota_bytes=at_once * description.lease_bytes[EXACT_VARIANT],
            transport=pb.TRANSPORT_SHARED_MEMORY if lock else pb.TRANSPORT_CHUNKS,
            lock_name=lock.path.name if lock else "",
        )
        session._requests.put(pb.SessionRequest(open=opening))
        threading.Thread(target=session._pump, name="store-replies", daemon=True).start()
        try:
            opened = session._next(time.monotonic() + _OPEN_S, lambda: None).opened
            if lock:
                session.memory = SegmentMemory(opened.segment_path, opened.epoch)
            else:
                session._private = PrivateMemory(num_slots, description.slot_bytes)
                session.memory = session._private
            session._local_socket = _connect_local(opened)
        except BaseException:
            session.close()
            raise
        return session

    def begin(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        prefetches: Sequence[RecordKey] = (),
        withdrawals: Sequence[RecordKey] = (),
    ) -> int:
        """Say what is given back, wanted, and guessed; does not wait. Returns the number of the
        exchange, for `answer`. Raises SessionLost.
        """
        exchange_id = next(self._ids)
        if self._private is not None:
            for key in releases:
                self._private.release(key)
        exchange = pb.Exchange(
            exchange_id=exchange_id,
            # With chunks the store gave its slot back when the bytes were sent.
            releases=[] if self._private is not None else [key.to_pb() for key in releases],
            acquires=[key.to_pb() for key in acquires],
            prefetches=[key.to_pb() for key in prefetches],
            withdrawals=[key.to_pb() for key in withdrawals],
        )
        self._send(exchange)
        if acquires:
            self._answers[exchange_id] = deque()
        return exchange_id

    def answer(self, exchange_id: int, deadline: float, check: Callable[[], None]) -> pb.Exchanged:
        """The next answer to this exchange; those to others are kept for them.

        Raises SessionLost, StoreUnavailable after the deadline, what `check` raises.
        """
        kept = self._answers[exchange_id]
        while not kept:
            exchanged = self._next_answer(deadline, check)
            if exchanged is not None and exchanged.exchange_id in self._answers:
                self._answers[exchanged.exchange_id].append(exchanged)
        return kept.popleft()

    def has_answer(self, exchange_id: int) -> bool:
        """Whether `answer` has something to look at: an answer, to this exchange or another, or the
        stream's end.
        """
        if self._answers[exchange_id] or self.broken:
            return True
        if self._local_socket is not None:
            return self._local_socket.has_message()
        return not self._replies.empty()

    def forget(self, exchange_id: int) -> None:
        """It is answered in full."""
        del self._answers[exchange_id]

    def borrowed(self, lease: pb.Lease) -> Borrowed:
        """What a lease lends, as tensors."""
        key = RecordKey.from_pb(lease.key)
        size_bytes = self._lease_bytes[key.variant]
        slot, generation = lease.slot, lease.generation
        if self._private is not None:
            slot, generation = self._private.slot_of(key), 0
        layout = self._spec.variant(key.variant).layouts[key.expert.layer]
        tensors = self.memory.tensors(slot, lease.start_bytes, lease.tensor_offsets, layout)
        cost = (lease.bytes_read, lease.read_s, lease.verify_s)
        place = (slot, lease.part, generation)
        return Borrowed(key.expert, *place, size_bytes, tensors, *cost, variant=key.variant)

    def close(self) -> None:
        """Nobody reads slots any more: let go of the lock first, so that the store sees it free."""
        if self._lock is not None:
            self._lock.release()
        if self._local_socket is not None:
            self._local_socket.close()
        self._requests.put(None)
        if self._call is not None:
            self._call.cancel()

    def _send(self, exchange: pb.Exchange) -> None:
        if self._local_socket is None:
            self._requests.put(pb.SessionRequest(exchange=exchange))
            return
        try:
            self._local_socket.send(exchange)
        except HungUp as error:
            raise SessionLost(str(error)) from error

    def _next_answer(self, deadline: float, check: Callable[[], None]) -> pb.Exchanged | None:
        if self._local_socket is not None:
            return self._local_answer(self._local_socket, deadline, check)
        return self._next(deadline, check).exchanged

    def _local_answer(
        self, local_socket: LocalSocket, deadline: float, check: Callable[[], None]
    ) -> pb.Exchanged | None:
        check()
        try:
            exchanged = local_socket.receive()
        except HungUp as error:
            raise SessionLost(str(error)) from error
        if exchanged is None:
            if self.broken:
                raise SessionLost("the stream to the store broke")
            _check_deadline(deadline)
        return exchanged

    def _next(self, deadline: float, check: Callable[[], None]) -> pb.SessionReply:
        while True:
            check()
            try:
                reply = self._replies.get(timeout=_POLL_S)
            except queue.Empty:
                _check_deadline(deadline)
                continue
            if isinstance(reply, Exception):
                raise reply
            return reply

    def _pump(self) -> None:
        """Put chunks in place, and move other replies to the waiting thread, until the stream ends;
        its end is a reply too.
        """
        for reply in _until_broken(self._call):
            if isinstance(reply, Exception) or reply.WhichOneof("kind") != "chunk":
                self.broken = isinstance(reply, Exception)
                self._replies.put(reply)
                continue
            try:
                self._place(reply.chunk)
            except errors.FlashMoEError as error:
                self.broken = True
                self._replies.put(error)
                return

    def _place(self, chunk: pb.Chunk) -> None:
        """Raises WeightsDamaged, InvalidRequest for what nobody asked for."""
        if self._private is None:
            raise errors.InvalidRequest("the store sent chunks to a shared-memory session")
        key = RecordKey.from_pb(chunk.key)
        checksum = chunk.checksum if chunk.last else None
        self._private.add_chunk(key, chunk.offset_bytes, chunk.data, checksum)


def _check_deadline(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise errors.StoreUnavailable("expert_store does not answer: see its log, then retry")


def _connect_local(opened: pb.Opened) -> LocalSocket | None:
    """The store's local socket. None: it cannot be reached, and the stream carries exchanges."""
    if not opened.local_socket_path:
        return None
    try:
        return LocalSocket(opened.local_socket_path, opened.session_id, _POLL_S)
    except errors.Unavailable as error:
        logger.warning(
            "no local socket, misses take the slower stream", extra={"reason": str(error)}
        )
        return None


def _until_broken(call: Any) -> Iterator[pb.SessionReply | Exception]:
    try:
        yield from call
    except grpc.RpcError as error:
        problem = errors.from_rpc(error)
        lost = isinstance(problem, (errors.Unavailable, errors.Cancelled))
        yield SessionLost(f"the stream to the store broke: {problem}") if lost else problem
    else:
        yield SessionLost("the store closed the session")


class _Lock:
    """A fresh locked file: while it is held, the store refills no slot of this session."""

    def __init__(self, session_dir: Path, node: str) -> None:
        session_dir.mkdir(parents=True, exist_ok=True)
        self.path = session_dir / f"{node}-{uuid.uuid4().hex[:12]}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor: int | None = os.open(self.path, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
