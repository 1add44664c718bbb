"""The gRPC face of a worker: messages become work for its one compute thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc.aio
import torch

from compute_node.boxes.box_residents import to_bytes
from compute_node.boxes.work import Work, bytes_of
from compute_node.worker.direct_way import MOST_OPEN, DirectWay, urgency_of
from compute_node.worker.lent_experts import LentExperts
from compute_node.worker.sessions import Sessions
from compute_node.worker.work_queue import Urgency, WorkQueue
from proto import errors
from proto import stats_pb2 as stats_pb
from proto import worker_pb2 as pb
from proto import worker_pb2_grpc as pb_grpc
from proto.direct_socket import DirectSocket
from proto.expert import ModelSpec
from proto.protocol import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

SERVICE_NAME = "flashmoe.v1.Worker"


class WorkerService(pb_grpc.WorkerServicer):
    """work: for the one thread that computes.

    direct_port: where `take_in` is called for who connects; 0: nowhere
    """

    def __init__(
        self,
        lent: LentExperts,
        spec: ModelSpec,
        shape: tuple[int, torch.dtype],
        slots: int,
        work: WorkQueue,
        snapshot: Callable[[], stats_pb.Snapshot],
    ) -> None:
        """shape: the model's hidden size, and what its activations are made of"""
        self._lent, self._spec, self._slots = lent, spec, slots
        self._hidden_size, self._dtype = shape
        self._work, self.snapshot = work, snapshot
        self._sessions = Sessions()
        self.direct_port = 0

    def register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_WorkerServicer_to_server(self, server)

    def take_in(self, connection: DirectSocket, session: bytes) -> bool:
        """Answer what comes over it as long as the stream that named `session` is open; False:
        there is none. Any thread.
        """

        def new_way(gone: threading.Event) -> DirectWay:
            do = partial(self._do, gone=gone)
            return DirectWay(connection, self._work, do, self._lent.prepare_left_out)

        return self._sessions.take_in(session, new_way)

    async def Describe(
        self, request: pb.WorkerDescriptionRequest, context: Any
    ) -> pb.WorkerDescription:
        return pb.WorkerDescription(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=self._spec.fingerprint,
            slots=self._slots,
            held=self._lent.held.to_bytes(self._spec),
            direct_port=self.direct_port,
        )

    async def Compute(
        self, requests: AsyncIterator[pb.WorkRequest], context: Any
    ) -> AsyncIterator[pb.WorkReply]:
        """The main node that leaves takes what it asked for with it."""
        gone = threading.Event()
        replies: asyncio.Queue[pb.WorkReply | Exception | None] = asyncio.Queue()
        receiving = asyncio.create_task(self._receive(requests, replies, gone))
        try:
            while (reply := await replies.get()) is not None:
                if isinstance(reply, Exception):
                    raise reply
                yield reply
        finally:
            gone.set()
            receiving.cancel()
            await asyncio.wait([receiving])

    async def Stats(self, request: stats_pb.StatsRequest, context: Any) -> stats_pb.Snapshot:
        return self.snapshot()

    async def _receive(
        self,
        requests: AsyncIterator[pb.WorkRequest],
        replies: asyncio.Queue[pb.WorkReply | Exception | None],
        gone: threading.Event,
    ) -> None:
        loop, under_way = asyncio.get_running_loop(), set[asyncio.Future[None]]()
        session = b""

        def answer(request: pb.WorkRequest, came_s: float, done: asyncio.Future[None]) -> None:
            reply = self._do(request, came_s, gone)
            loop.call_soon_threadsafe(_reply, replies, reply, done)
            if reply is not None:
                self._lent.prepare_left_out()

        try:
            async for request in requests:
                if request.session:
                    self._sessions.begin(request.session, gone)
                    session = request.session
                    continue
                if len(under_way) >= MOST_OPEN:
                    raise errors.SlotsExhausted(f"{MOST_OPEN} requests have no reply yet: wait")
                done = loop.create_future()
                under_way.add(done)
                done.add_done_callback(under_way.discard)
                self._work.put(
                    urgency_of(request), partial(answer, request, time.monotonic(), done)
                )
            if under_way:
                await asyncio.wait(under_way)
        except errors.FlashMoEError as error:
            replies.put_nowait(error)
        finally:
            self._sessions.end(session)
            self._work.put(Urgency.PREPARE, self._lent.forget_prepared)
            replies.put_nowait(None)

    def _do(
        self, request: pb.WorkRequest, came_s: float, gone: threading.Event
    ) -> pb.WorkReply | None:
        """On the compute thread. None: it only prepares."""
        if not request.prepares:
            reply = self._answer(request, gone)
            reply.took_us = int(1e6 * (time.monotonic() - came_s))
            return reply
        if not gone.is_set():
            try:
                have_read = self._lent.move_in if request.moves else self._lent.prepare
                have_read(request.layer, request.experts)
            except errors.InvalidRequest as error:
                logger.warning("nothing prepared", extra={"reason": str(error)})
        return None

    def _answer(self, request: pb.WorkRequest, gone: threading.Event) -> pb.WorkReply:
        def check() -> None:
            if gone.is_set():
                raise errors.Cancelled("the main node went away")

        try:
            check()
            work = Work.from_pb(request, self._hidden_size, self._dtype)
            rows = self._lent.compute(
                work, check, partial(self._work.run_next, Urgency.PREPARE), self._give_way
            )
            return pb.WorkReply(
                id=request.id,
                rows=bytes_of(rows),
                num_read=self._lent.num_read,
                read_us=int(1e6 * self._lent.read_s),
                resident=to_bytes(self._lent.held_of(request.layer)),
            )
        except errors.FlashMoEError as error:
            logger.warning("work failed", extra={"layer": request.layer, "reason": str(error)})
            return pb.WorkReply(id=request.id, error=str(error))
        except Exception as error:
            logger.exception("work failed", extra={"layer": request.layer})
            return pb.WorkReply(id=request.id, error=f"{type(error).__name__}: {error}")

    def _give_way(self) -> None:
        """To what is more urgent than a prompt."""
        while self._work.run_next(Urgency.TOKEN):
            pass


def _reply(
    replies: asyncio.Queue[Any], reply: pb.WorkReply | None, done: asyncio.Future[None]
) -> None:
    if reply is not None:
        replies.put_nowait(reply)
    if not done.done():
        done.set_result(None)
