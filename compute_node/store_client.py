"""The demand arrow's near end: opens a session with the store and borrows experts. Blocking, for
one thread.

A session that breaks takes every lease with it: the caller forgets what it borrowed and borrows
again.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from compute_node.expert_memory import Borrowed, ExpertMemory, PrivateMemory, SegmentMemory
from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto import expert_store_pb2_grpc as pb_grpc
from proto.expert import ExpertKey, ModelSpec

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_RETRY_S = 0.1


class SessionLost(errors.Unavailable):
    """The stream to the store broke: every lease is gone."""


@dataclass(frozen=True)
class StoreDescription:
    """What the store says of itself."""

    spec: ModelSpec
    model_dir: Path
    slot_bytes: int
    num_slots: int


@dataclass(frozen=True)
class Arrival:
    """An expert that came, with what it cost. bytes_read is 0 when another node's copy answered.

    read_s: what the store spent reading and verifying it, queueing excluded
    """

    borrowed: Borrowed
    bytes_read: int
    read_s: float = 0.0


class StoreClient:
    """One node's connection to its store.

    session_dir: where the node's lock files lie; None: another host, bytes come as chunks
    deadline_s:  how long to wait for a store that is away
    """

    def __init__(
        self,
        address: str,
        node: str,
        quota_slots: int,
        session_dir: Path | None,
        deadline_s: float,
        tls: rpc.TlsFiles | None = None,
    ) -> None:
        self._channel = rpc.connect(address, tls)
        self._stub = pb_grpc.ExpertStoreStub(self._channel)
        self._address = address
        self._node = node
        self._quota_slots = quota_slots
        self._session_dir = session_dir
        self._deadline_s = deadline_s
        self._session: _Session | None = None
        self._description: StoreDescription | None = None
        self.num_opened = 0

    def describe(self) -> StoreDescription:
        """Wait for the store and ask what it serves.

        Raises StoreUnavailable after the deadline, VersionMismatch.
        """
        reply = self._until_deadline(
            lambda: self._stub.Describe(pb.DescribeRequest(), timeout=self._deadline_s)
        )
        if reply.protocol_version != rpc.PROTOCOL_VERSION:
            raise errors.VersionMismatch(
                f"the store speaks protocol {reply.protocol_version}, this node "
                f"{rpc.PROTOCOL_VERSION}: update the older one"
            )
        spec = ModelSpec.from_pb(reply.model)
        self._description = StoreDescription(
            spec, Path(reply.model_dir), reply.slot_bytes, reply.num_slots
        )
        return self._description

    @property
    def is_open(self) -> bool:
        """Whether leases still count; false as soon as the stream breaks, even if nobody waits."""
        return self._session is not None and not self._session.broken

    def open(self, check: Callable[[], None] = lambda: None) -> None:
        """Open a session, waiting for the store if it is away; what was borrowed before is gone.

        check: called while waiting; may raise to give up
        Raises StoreUnavailable after the deadline, SlotsExhausted, VersionMismatch (another model).
        """
        self.abort()
        description = self._description or self.describe()
        self._session = self._until_deadline(lambda: self._open_once(description), check)
        self.num_opened += 1

    def exchange(
        self,
        releases: Sequence[ExpertKey],
        acquires: Sequence[ExpertKey],
        check: Callable[[], None] = lambda: None,
    ) -> list[Arrival]:
        """Give experts back and borrow others, in one round trip; blocks until all have come.

        Raises SessionLost (nothing is borrowed any more), StoreUnavailable when no answer comes
        before the deadline,
        ExpertDamaged (the others came and were given back), and what `check` raises.
        """
        if self._session is None:
            raise SessionLost("there is no session: open one")
        try:
            return self._session.exchange(releases, acquires, self._deadline_s, check)
        except errors.ExpertDamaged:
            raise
        except BaseException:
            # Leases may be on their way that nobody would account for: end the session as a whole.
            self.abort()
            raise

    def resident(self) -> list[ExpertKey]:
        """What the store has in memory. Raises StoreUnavailable."""
        reply = self._until_deadline(
            lambda: self._stub.Resident(pb.ResidentRequest(), timeout=self._deadline_s)
        )
        return [ExpertKey.from_pb(key) for key in reply.keys]

    def is_current(self, borrowed: Borrowed) -> bool:
        """Whether the slot still holds what was lent."""
        session = self._session
        return (
            session is not None and session.memory.generation(borrowed.slot) == borrowed.generation
        )

    def abort(self) -> None:
        """End the session and let go of its lock: the store may refill every slot."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def close(self) -> None:
        self.abort()
        self._channel.close()

    def _open_once(self, description: StoreDescription) -> _Session:
        quota_slots = min(self._quota_slots, description.spec.num_experts_total)
        return _Session.open(self._stub, self._node, quota_slots, self._session_dir, description)

    def _until_deadline(
        self, call: Callable[[], Any], check: Callable[[], None] = lambda: None
    ) -> Any:
        """Repeat `call` while the store is away, up to the deadline."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            check()
            try:
                return call()
            except grpc.RpcError as error:
                problem = errors.from_rpc(error)
            except (errors.Unavailable, errors.SegmentInvalid) as error:
                problem = error
            if not isinstance(problem, (errors.Unavailable, errors.SegmentInvalid)):
                raise problem
            if time.monotonic() > deadline:
                raise errors.StoreUnavailable(
                    f"expert_store at {self._address} stayed away for {self._deadline_s:g} s "
                    f"({problem}): start it, then retry"
                )
            time.sleep(_RETRY_S)


class _Session:
    """One open stream, its lock, and the memory its leases point into."""

    def __init__(self, lock: _Lock | None, description: StoreDescription) -> None:
        self._call: Any = None
        self._lock = lock
        self._layouts = description.spec.layouts
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[pb.SessionReply | Exception] = queue.SimpleQueue()
        self._ids = itertools.count(1)
        self.broken = False
        self.memory: ExpertMemory

    @classmethod
    def open(
        cls,
        stub: Any,
        node: str,
        quota_slots: int,
        session_dir: Path | None,
        description: StoreDescription,
    ) -> _Session:
        """Raises grpc.RpcError, Unavailable, SegmentInvalid, SlotsExhausted, VersionMismatch."""
        lock = _Lock(session_dir, node) if session_dir is not None else None
        session = cls(lock, description)
        session._call = stub.Session(iter(session._requests.get, None))
        opening = pb.Open(
            protocol_version=rpc.PROTOCOL_VERSION,
            fingerprint=description.spec.fingerprint,
            node=node,
            quota_slots=quota_slots,
            transport=pb.TRANSPORT_SHARED_MEMORY if lock else pb.TRANSPORT_CHUNKS,
            lock_name=lock.path.name if lock else "",
        )
        session._requests.put(pb.SessionRequest(open=opening))
        threading.Thread(target=session._pump, name="store-replies", daemon=True).start()
        try:
            opened = session._next(time.monotonic() + _OPEN_S, lambda: None).opened
            session.memory = (
                SegmentMemory(opened.segment_path, opened.epoch)
                if lock
                else PrivateMemory(quota_slots, description.slot_bytes)
            )
        except BaseException:
            session.close()
            raise
        return session

    def exchange(
        self,
        releases: Sequence[ExpertKey],
        acquires: Sequence[ExpertKey],
        deadline_s: float,
        check: Callable[[], None],
    ) -> list[Arrival]:
        exchange_id = next(self._ids)
        self._send(exchange_id, releases, acquires)
        deadline = time.monotonic() + deadline_s
        while True:
            reply = self._next(deadline, check)
            if reply.WhichOneof("kind") == "chunk":
                self._add_chunk(reply.chunk)
            elif reply.exchanged.exchange_id == exchange_id:
                return self._receive(reply.exchanged)

    def close(self) -> None:
        """Nobody reads slots any more: let go of the lock first, so that the store sees it free."""
        if self._lock is not None:
            self._lock.release()
        self._requests.put(None)
        if self._call is not None:
            self._call.cancel()

    def _send(
        self, exchange_id: int, releases: Sequence[ExpertKey], acquires: Sequence[ExpertKey]
    ) -> None:
        over_chunks = isinstance(self.memory, PrivateMemory)
        if isinstance(self.memory, PrivateMemory):
            for key in releases:
                self.memory.release(key)
        exchange = pb.Exchange(
            exchange_id=exchange_id,
            # With chunks the store gave its slot back when the bytes were sent.
            releases=[] if over_chunks else [key.to_pb() for key in releases],
            acquires=[key.to_pb() for key in acquires],
        )
        self._requests.put(pb.SessionRequest(exchange=exchange))

    def _receive(self, exchanged: pb.Exchanged) -> list[Arrival]:
        arrivals, damage = [], None
        for lease in exchanged.leases:
            if lease.HasField("error"):
                damage = errors.from_kind(lease.error.kind, lease.error.message)
            else:
                arrivals.append(self._arrival(lease))
        if damage is None:
            return arrivals
        self._send(next(self._ids), [arrival.borrowed.key for arrival in arrivals], [])
        raise damage

    def _arrival(self, lease: pb.Lease) -> Arrival:
        key, memory = ExpertKey.from_pb(lease.key), self.memory
        slot, generation = lease.slot, lease.generation
        if isinstance(memory, PrivateMemory):
            slot, generation = memory.slot_of(key), 0
        tensors = memory.tensors(slot, lease.tensor_offsets, self._layouts[key.layer])
        borrowed = Borrowed(key, slot, generation, tensors)
        return Arrival(borrowed, lease.bytes_read, lease.read_s)

    def _add_chunk(self, chunk: pb.Chunk) -> None:
        if not isinstance(self.memory, PrivateMemory):
            raise errors.InvalidRequest("the store sent chunks to a shared-memory session")
        key = ExpertKey.from_pb(chunk.key)
        checksum = chunk.checksum if chunk.last else None
        self.memory.add_chunk(key, chunk.offset_bytes, chunk.data, checksum)

    def _next(self, deadline: float, check: Callable[[], None]) -> pb.SessionReply:
        while True:
            check()
            try:
                reply = self._replies.get(timeout=_POLL_S)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise errors.StoreUnavailable(
                        "expert_store does not answer: see its log, then retry"
                    ) from None
                continue
            if isinstance(reply, Exception):
                raise reply
            return reply

    def _pump(self) -> None:
        """Move replies to the waiting thread until the stream ends; its end is a reply too."""
        for reply in _until_broken(self._call):
            self.broken = isinstance(reply, Exception)
            self._replies.put(reply)


_OPEN_S = 10.0


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
