"""A node that says whatever it is told to: the bare wire, for what the real client never sends."""

from __future__ import annotations

import fcntl
import os
import queue
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import xxhash

from expert_store.store.slots import SlotPool
from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto import expert_store_pb2_grpc as pb_grpc
from proto import stats_pb2 as stats_pb
from proto.expert import RecordKey
from proto.protocol import PROTOCOL_VERSION
from proto.stats import Stats

DEADLINE_S = 20.0


def until(condition: Callable[[], bool], what: str = "it") -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.005)


class Lock:
    """A held lock file of a node."""

    def __init__(self, session_dir: Path, name: str) -> None:
        session_dir.mkdir(parents=True, exist_ok=True)
        self.path = session_dir / name
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def let_go(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


class RawSession:
    """One stream, request by request and reply by reply."""

    def __init__(self, stub: Any) -> None:
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._call = stub.Session(iter(self._requests.get, None), timeout=DEADLINE_S)

    def send(self, request: pb.SessionRequest) -> None:
        self._requests.put(request)

    def next(self) -> pb.SessionReply:
        """Raises the typed error that ended the stream; EOFError when it ended well."""
        try:
            reply: pb.SessionReply = next(self._call)
        except StopIteration:
            raise EOFError("the store closed the session") from None
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None
        return reply

    def finish(self) -> None:
        """Say nothing more; what was asked is still answered."""
        self._requests.put(None)

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()

    def __enter__(self) -> RawSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(
        self,
        acquires: Iterable[RecordKey] = (),
        releases: Iterable[RecordKey] = (),
        prefetches: Iterable[RecordKey] = (),
        exchange_id: int = 1,
    ) -> list[pb.Lease]:
        """Leases of shared memory, in the order of `acquires`."""
        wanted = list(acquires)
        self.send(exchange(wanted, releases, prefetches, exchange_id))
        leases: list[pb.Lease] = []
        while len(leases) < len(wanted):
            leases += self.next().exchanged.leases
        return sorted(leases, key=lambda lease: wanted.index(RecordKey.from_pb(lease.key)))


def exchange(
    acquires: Iterable[RecordKey] = (),
    releases: Iterable[RecordKey] = (),
    prefetches: Iterable[RecordKey] = (),
    exchange_id: int = 1,
    withdrawals: Iterable[RecordKey] = (),
) -> pb.SessionRequest:
    message = pb.Exchange(
        exchange_id=exchange_id,
        acquires=[key.to_pb() for key in acquires],
        releases=[key.to_pb() for key in releases],
        prefetches=[key.to_pb() for key in prefetches],
        withdrawals=[key.to_pb() for key in withdrawals],
    )
    return pb.SessionRequest(exchange=message)


class Wire:
    """A channel to a running store, and what a healthy store says of itself."""

    def __init__(self, address: str, run_dir: Path) -> None:
        self._channel = rpc.connect(address)
        self.stub = pb_grpc.ExpertStoreStub(self._channel)
        self.session_dir = run_dir / "sessions"

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def describe(self) -> pb.DescribeReply:
        return self.stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S)

    def resident(self) -> set[RecordKey]:
        reply = self.stub.Resident(pb.ResidentRequest(), timeout=DEADLINE_S)
        return {RecordKey.from_pb(key) for key in reply.keys}

    def stats(self) -> Stats:
        return Stats.from_pb(self.stub.Stats(stats_pb.StatsRequest(), timeout=DEADLINE_S))

    def until_stats(self, condition: Callable[[Stats], bool]) -> Stats:
        until(lambda: condition(self.stats()), "the store's counters")
        return self.stats()

    def until_idle(self) -> Stats:
        """Nobody holds a session, and nothing is filling or leased."""
        return self.until_stats(
            lambda s: not (s.sessions or s.orphaned_sessions or s.slots_filling or s.slots_leased)
        )

    def opening(self, quota_slots: int = 2, **changes: Any) -> pb.SessionRequest:
        """quota_slots: the quota in whole slots, unless `changes` has it in bytes"""
        described = self.describe()
        fields: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "fingerprint": described.model.fingerprint,
            "node": "node",
            "quota_bytes": quota_slots * described.slot_bytes,
            "transport": pb.TRANSPORT_CHUNKS,
        }
        return pb.SessionRequest(open=pb.Open(**(fields | changes)))

    def open_chunks(self, quota_slots: int = 2) -> RawSession:
        session = RawSession(self.stub)
        session.send(self.opening(quota_slots=quota_slots))
        assert session.next().WhichOneof("kind") == "opened"
        return session

    def open_shared(self, lock: Lock, quota_slots: int = 2) -> tuple[RawSession, pb.Opened]:
        session = RawSession(self.stub)
        session.send(
            self.opening(
                quota_slots=quota_slots,
                transport=pb.TRANSPORT_SHARED_MEMORY,
                lock_name=lock.path.name,
            )
        )
        return session, session.next().opened


def counts_add_up(slots: SlotPool, num_slots: int) -> bool:
    counts = slots.counts()
    return sum(counts.values()) == num_slots and counts["filling"] == counts["leased"] == 0


def receive(session: RawSession, count: int = 1) -> dict[RecordKey, tuple[bytes, pb.Lease]]:
    """`count` records put together from chunks, each compared with its checksum; damaged ones are
    empty.
    """
    found: dict[RecordKey, tuple[bytes, pb.Lease]] = {}
    records, data = {}, bytearray()
    while len(found) < count:
        reply = session.next()
        for lease in reply.exchanged.leases:
            key = RecordKey.from_pb(lease.key)
            found[key] = records.pop(key, b""), lease
        if reply.WhichOneof("kind") == "chunk":
            chunk = reply.chunk
            assert len(chunk.data) <= rpc.CHUNK_BYTES
            data += chunk.data
            if chunk.last:
                assert xxhash.xxh3_64_intdigest(data) == chunk.checksum
                records[RecordKey.from_pb(chunk.key)] = bytes(data)
                data.clear()
    assert not data and not records
    return found


def outcome(session: RawSession) -> type[Exception] | None:
    """How the stream ended, after all its replies: None when it ended well."""
    try:
        while True:
            session.next()
    except EOFError:
        return None
    except errors.FlashMoEError as error:
        return type(error)
