"""The gRPC face of the store: translates messages, and no more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expert_store.face.checkpoint import Checkpoint
from expert_store.face.chunks import ChunkQueue, chunks_of
from expert_store.face.exchange import is_acknowledged, perform
from expert_store.store import sessions
from expert_store.store.store import ExpertStore
from proto import errors
from proto import expert_store_pb2 as pb
from proto import expert_store_pb2_grpc as pb_grpc
from proto import stats_pb2 as stats_pb
from proto.expert import RecordKey
from proto.protocol import PROTOCOL_VERSION, check_version

logger = logging.getLogger(__name__)

SERVICE_NAME = "flashmoe.v1.ExpertStore"
_MAX_UNANSWERED = 64
_DRAIN_POLL_S = 0.005


class ExpertStoreService(pb_grpc.ExpertStoreServicer):
    """checkpoint: whose experts are served

    local_socket_path: where nodes on this host may connect; None: nowhere
    """

    def __init__(
        self, store: ExpertStore, checkpoint: Checkpoint, local_socket_path: Path | None
    ) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self._local_socket_path = local_socket_path
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """End every session once its exchanges are answered; open no more."""
        self._draining.set()

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        layout = self._store.segment.layout
        return pb.DescribeReply(
            protocol_version=PROTOCOL_VERSION,
            model=self._store.manifest.spec.to_pb(),
            model_dir=str(self._checkpoint.folder),
            slot_bytes=layout.slot_bytes,
            num_slots=layout.num_slots,
            read_depth=self._store.read_depth,
            direct_io=self._store.direct_io,
            num_spare_slots=self._store.num_spare,
            piece_bytes=self._store.piece_bytes,
            lease_bytes=self._store.sessions.lease_bytes,
            held=self._store.manifest.held.to_bytes(self._store.manifest.spec),
            config=self._checkpoint.config,
            hidden_size=self._checkpoint.hidden_size,
            share=self._checkpoint.share,
        )

    async def Resident(self, request: pb.ResidentRequest, context: Any) -> pb.ResidentReply:
        return pb.ResidentReply(keys=[key.to_pb() for key in self._store.slots.resident()])

    async def Stats(self, request: stats_pb.StatsRequest, context: Any) -> stats_pb.Snapshot:
        return self._store.snapshot()

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionReply]:
        if self._draining.is_set():
            raise errors.Unavailable("the store is stopping: retry")
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "open":
            raise errors.InvalidRequest("a session starts with an open message")
        session = self._open(first.open)
        try:
            yield pb.SessionReply(opened=self._opened(session))
            stream = _SessionStream(self._store, session, self._draining)
            async for reply in stream.replies(request_iterator):
                yield reply
        finally:
            self._store.sessions.close(session)

    def _open(self, request: pb.Open) -> sessions.Session:
        check_version("the node", request.protocol_version)
        fingerprint = self._store.manifest.spec.fingerprint
        if request.fingerprint != fingerprint:
            raise errors.VersionMismatch(
                f"the store serves model {fingerprint}, the node wants {request.fingerprint}"
            )
        if request.transport not in (pb.TRANSPORT_SHARED_MEMORY, pb.TRANSPORT_CHUNKS):
            raise errors.InvalidRequest("choose a transport: shared memory or chunks")
        shared = request.transport == pb.TRANSPORT_SHARED_MEMORY
        return self._store.sessions.open(
            request.node, request.quota_bytes, request.lock_name if shared else None
        )

    def _opened(self, session: sessions.Session) -> pb.Opened:
        segment = self._store.segment
        return pb.Opened(
            session_id=session.session_id,
            segment_path=str(segment.path) if session.lock_path else "",
            epoch=segment.epoch,
            slot_bytes=segment.layout.slot_bytes,
            num_slots=segment.layout.num_slots,
            local_socket_path=str(self._local_socket_path)
            if session.lock_path and self._local_socket_path
            else "",
        )


class _SessionStream:
    """Reads exchanges, answers each as its leases come; the first error ends the stream."""

    def __init__(
        self, store: ExpertStore, session: sessions.Session, draining: asyncio.Event
    ) -> None:
        self._store = store
        self._session = session
        self._draining = draining
        self._loop = asyncio.get_running_loop()
        num_replies = 2 if session.lock_path is None else 8  # a chunk is a megabyte
        self._replies: asyncio.Queue[pb.SessionReply | errors.FlashMoEError | None]
        self._replies = asyncio.Queue(num_replies)
        self._unanswered: dict[int, int] = {}  # exchange -> leases to come
        self._answers: set[asyncio.Task[None]] = set()
        self._sends_a_record = asyncio.Lock()  # one record after the other
        self._queue: ChunkQueue | None = None
        if session.lock_path is None:
            self._queue = ChunkQueue(store, session, self._deliver)

    async def replies(
        self, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncIterator[pb.SessionReply]:
        reading = asyncio.create_task(self._read(requests))
        drained = asyncio.create_task(self._end_when_drained())
        try:
            while (reply := await self._replies.get()) is not None:
                if isinstance(reply, errors.FlashMoEError):
                    raise reply
                yield reply
        finally:
            tasks = [reading, drained, *self._answers]
            for task in tasks:
                task.cancel()
            # An answer may be giving back what it sent: the session closes after it.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        try:
            async for request in requests:
                self._start(request)
        except errors.FlashMoEError as error:
            await self._replies.put(error)
            return
        await self._finish_answers()
        await self._replies.put(None)

    async def _end_when_drained(self) -> None:
        await self._draining.wait()
        await self._finish_answers()
        await self._replies.put(errors.Unavailable("the store is stopping: retry"))

    async def _finish_answers(self) -> None:
        """Also what was asked over the local socket."""
        while self._unanswered or self._answers or self._session.awaited:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_POLL_S)

    def _start(self, request: pb.SessionRequest) -> None:
        if request.WhichOneof("kind") != "exchange":
            raise errors.InvalidRequest("after its opening a session carries exchanges")
        if len(self._unanswered) >= _MAX_UNANSWERED:
            raise errors.QueueFull(f"{_MAX_UNANSWERED} exchanges are unanswered: wait for some")
        exchange = request.exchange
        number = exchange.exchange_id
        if number in self._unanswered:
            raise errors.InvalidRequest(f"exchange {number} is not answered yet: count on")
        if exchange.acquires:
            self._unanswered[number] = len(exchange.acquires)

        perform(self._store, self._session, exchange, partial(self._acquire, number))
        if is_acknowledged(exchange):
            self._answer(number, [])

    def _acquire(self, exchange_id: int, keys: Sequence[RecordKey]) -> None:
        if self._queue is not None:
            self._queue.put(exchange_id, keys)
        else:
            self._store.acquire(self._session, keys, partial(self._deliver, exchange_id))

    def _deliver(self, exchange_id: int, leases: list[pb.Lease]) -> None:
        """Called on any thread."""
        self._loop.call_soon_threadsafe(self._answer, exchange_id, leases)

    def _answer(self, exchange_id: int, leases: list[pb.Lease]) -> None:
        task = asyncio.create_task(self._send(exchange_id, leases))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _send(self, exchange_id: int, leases: list[pb.Lease]) -> None:
        if self._queue is not None:
            await self._send_chunks(self._queue, exchange_id, leases)
        exchanged = pb.Exchanged(exchange_id=exchange_id, leases=leases)
        await self._replies.put(pb.SessionReply(exchanged=exchanged))
        if exchange_id in self._unanswered:
            self._unanswered[exchange_id] -= len(leases)
            if self._unanswered[exchange_id] == 0:
                del self._unanswered[exchange_id]

    async def _send_chunks(
        self, queue: ChunkQueue, exchange_id: int, leases: list[pb.Lease]
    ) -> None:
        """Copy each record to the stream and give it back: the next one has its room."""
        for lease in leases:
            if not lease.HasField("error"):
                await self._send_record(exchange_id, RecordKey.from_pb(lease.key))
            try:
                queue.issue()
            except errors.FlashMoEError as error:
                await self._replies.put(error)

    async def _send_record(self, exchange_id: int, key: RecordKey) -> None:
        part, record = self._session.leases[key], self._store.manifest.records[key]
        try:
            async with self._sends_a_record:
                with self._store.segment.view(*part.place) as view:
                    for chunk in chunks_of(record, view):
                        chunk.exchange_id = exchange_id
                        await self._replies.put(pb.SessionReply(chunk=chunk))
        finally:
            self._store.sessions.release(self._session, [key])
