"""One open stream to the store: its lock, its memory, and the exchanges it carries. Blocking, for
one thread.

A session that breaks takes every lease with it.
"""

from __future__ import annotations

import fcntl
import itertools
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
from proto.expert import ExpertKey, ModelSpec

_POLL_S = 0.05
_OPEN_S = 10.0


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


class StoreSession:
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
    ) -> StoreSession:
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
