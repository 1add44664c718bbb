"""The gRPC face of a worker: messages become work for its one compute thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
import torch

from compute_node.boxes.work import Work, bytes_of
from compute_node.worker.lent_experts import LentExperts
from proto import errors, rpc
from proto import stats_pb2 as stats_pb
from proto import worker_pb2 as pb
from proto import worker_pb2_grpc as pb_grpc
from proto.expert import ModelSpec

logger = logging.getLogger(__name__)

SERVICE_NAME = "flashmoe.v1.Worker"
_MOST_OPEN = 256  # requests of one stream without a reply


class WorkerService(pb_grpc.WorkerServicer):
    """thread: the one that computes."""

    def __init__(
        self,
        lent: LentExperts,
        spec: ModelSpec,
        shape: tuple[int, torch.dtype],
        slots: int,
        thread: ThreadPoolExecutor,
        snapshot: Callable[[], stats_pb.Snapshot],
    ) -> None:
        """shape: the model's hidden size, and what its activations are made of"""
        self._lent, self._spec, self._slots = lent, spec, slots
        self._hidden_size, self._dtype = shape
        self._thread, self.snapshot = thread, snapshot

    def register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_WorkerServicer_to_server(self, server)

    async def Describe(
        self, request: pb.WorkerDescriptionRequest, context: Any
    ) -> pb.WorkerDescription:
        return pb.WorkerDescription(
            protocol_version=rpc.PROTOCOL_VERSION,
            fingerprint=self._spec.fingerprint,
            slots=self._slots,
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

        def answer(request: pb.WorkRequest) -> None:
            reply = self._answer(request, gone)
            loop.call_soon_threadsafe(replies.put_nowait, reply)

        try:
            async for request in requests:
                if len(under_way) >= _MOST_OPEN:
                    replies.put_nowait(
                        errors.SlotsExhausted(f"{_MOST_OPEN} requests have no reply yet: wait")
                    )
                    return
                future = loop.run_in_executor(self._thread, answer, request)
                under_way.add(future)
                future.add_done_callback(under_way.discard)
            if under_way:
                await asyncio.wait(under_way)
        finally:
            replies.put_nowait(None)

    def _answer(self, request: pb.WorkRequest, gone: threading.Event) -> pb.WorkReply:
        """On the compute thread."""

        def check() -> None:
            if gone.is_set():
                raise errors.Cancelled("the main node went away")

        try:
            check()
            work = Work.from_pb(request, self._hidden_size, self._dtype)
            return pb.WorkReply(id=request.id, rows=bytes_of(self._lent.compute(work, check)))
        except errors.FlashMoEError as error:
            logger.warning("work failed", extra={"layer": request.layer, "reason": str(error)})
            return pb.WorkReply(id=request.id, error=str(error))
        except Exception as error:
            logger.exception("work failed", extra={"layer": request.layer})
            return pb.WorkReply(id=request.id, error=f"{type(error).__name__}: {error}")
