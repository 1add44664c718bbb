"""Records as chunks, for sessions on other hosts: which are under way, and what a chunk holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import xxhash

from expert_store.manifest.extents import ExpertRecord
from expert_store.store.sessions import Session
from expert_store.store.store import ExpertStore
from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey

DeliverTo = Callable[[int, list[pb.Lease]], None]
"""Given the number of the exchange that asked, and leases; any thread may call it."""


class ChunkQueue:
    """What one session with chunks asked for. Its quota bounds what is under way; the rest waits
    here, so that a node may hold more than the store has room for. For the event loop.
    """

    def __init__(self, store: ExpertStore, session: Session, deliver: DeliverTo) -> None:
        self._store, self._session, self._deliver = store, session, deliver
        self._waiting: deque[tuple[int, RecordKey]] = deque()

    def put(self, exchange_id: int, keys: Sequence[RecordKey]) -> None:
        """Raises UnknownExpert, InvalidRequest for a key twice, and what `issue` raises."""
        for key in keys:
            self._store.manifest.record(key)
        if len(set(keys)) != len(keys):
            raise errors.InvalidRequest("an expert is asked for twice in one message")
        self._waiting.extend((exchange_id, key) for key in keys)
        self.issue()

    def issue(self) -> None:
        """Have as many lent as there is room for; to be called when a lease was given back.

        Raises what `ExpertStore.acquire` raises: SlotsExhausted only for a record that is larger
        than the quota.
        """
        while self._waiting:
            exchange_id, key = self._waiting[0]
            if self._session.held_bytes and not self._store.sessions.has_room(self._session, key):
                return
            self._waiting.popleft()
            self._store.acquire(self._session, [key], partial(self._deliver, exchange_id))


def chunks_of(record: ExpertRecord, view: memoryview) -> Iterator[pb.Chunk]:
    """The record's bytes in order; the last chunk carries their checksum. view: of its slot"""
    digest = xxhash.xxh3_64()
    for number, extent in enumerate(record.extents):
        end = extent.place_bytes + extent.length_bytes
        for offset in range(extent.place_bytes, end, rpc.CHUNK_BYTES):
            data = bytes(view[offset : min(offset + rpc.CHUNK_BYTES, end)])
            digest.update(data)
            last = number == len(record.extents) - 1 and offset + len(data) == end
            yield pb.Chunk(
                key=record.key.to_pb(),
                offset_bytes=offset,
                data=data,
                last=last,
                checksum=digest.intdigest() if last else 0,
            )
