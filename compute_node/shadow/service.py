"""The gRPC face of a shadow node."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc.aio

from compute_node.model.loaded import LoadedModel
from compute_node.predict.drawing import Drawing
from compute_node.shadow.follower import Follower, OutOfStep, Tell, Token, nothing
from proto import errors
from proto import shadow_pb2 as pb
from proto import shadow_pb2_grpc as pb_grpc
from proto import stats_pb2 as stats_pb
from proto.protocol import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

SERVICE_NAME = "flashmoe.v1.Shadow"
_MOST_OPEN = 4096  # requests of one stream that wait


@dataclass(eq=False)
class _Stream:
    """Of one main node. send: any thread"""

    number: int
    send: Callable[[pb.FollowReply], None]
    waiting: deque[pb.FollowRequest] = field(default_factory=deque)
    is_gone: threading.Event = field(default_factory=threading.Event)

    def check(self, sequence: str, guess: Token) -> None:
        """Raises Cancelled once something waits but that this guess of the sequence is right."""
        if self.is_gone.is_set():
            raise errors.Cancelled("the main node went away")
        if self.waiting and not _says(self.waiting[0], sequence, guess):
            raise errors.Cancelled("the main node has gone on")


class ShadowService(pb_grpc.ShadowServicer):
    """thread: the one that computes."""

    def __init__(
        self,
        follower: Follower,
        loaded: LoadedModel,
        thread: ThreadPoolExecutor,
        snapshot: Callable[[], stats_pb.Snapshot],
    ) -> None:
        self._follower, self._loaded, self._thread = follower, loaded, thread
        self.snapshot = snapshot
        self._num_streams = 0

    def register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_ShadowServicer_to_server(self, server)

    async def Describe(
        self, request: pb.ShadowDescriptionRequest, context: Any
    ) -> pb.ShadowDescription:
        spec = self._loaded.spec
        return pb.ShadowDescription(
            protocol_version=PROTOCOL_VERSION,
            moe_layers=spec.moe_layers,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            vocab_size=self._loaded.vocab_size,
            weights=str(spec.weight_format),
        )

    async def Follow(
        self, requests: AsyncIterator[pb.FollowRequest], context: Any
    ) -> AsyncIterator[pb.FollowReply]:
        self._num_streams += 1
        loop, replies = asyncio.get_running_loop(), asyncio.Queue[pb.FollowReply | None]()

        def send(reply: pb.FollowReply) -> None:
            loop.call_soon_threadsafe(replies.put_nowait, reply)

        stream = _Stream(self._num_streams, send)
        receiving = asyncio.create_task(self._receive(requests, stream, replies))
        try:
            while (reply := await replies.get()) is not None:
                yield reply
        finally:
            stream.is_gone.set()
            receiving.cancel()
            await asyncio.wait([receiving])

    async def Stats(self, request: stats_pb.StatsRequest, context: Any) -> stats_pb.Snapshot:
        return self.snapshot()

    async def _receive(
        self,
        requests: AsyncIterator[pb.FollowRequest],
        stream: _Stream,
        replies: asyncio.Queue[pb.FollowReply | None],
    ) -> None:
        try:
            async for request in requests:
                if len(stream.waiting) >= _MOST_OPEN:
                    logger.warning("a main node is too far ahead, its stream ends")
                    return
                stream.waiting.append(request)
                self._thread.submit(self._run_next, stream)
        finally:
            self._thread.submit(self._follower.forget, f"{stream.number}/")
            replies.put_nowait(None)

    def _run_next(self, stream: _Stream) -> None:
        """On the compute thread."""
        if stream.is_gone.is_set():
            return
        request = stream.waiting.popleft()
        name = f"{stream.number}/{request.sequence}/"
        if not request.token_ids:
            self._follower.forget(name)
            return
        is_behind = request.sequence in {other.sequence for other in stream.waiting}
        tell = nothing if is_behind else partial(_tell, stream, request.sequence)
        try:
            self._follow(stream, request, name, tell)
        except OutOfStep as error:
            self._send_lacks(stream, request, error.num_tokens)
        except Exception as error:
            is_known = isinstance(error, errors.FlashMoEError)
            logger.warning(
                "a sequence is begun anew", extra={"reason": str(error)}, exc_info=not is_known
            )
            self._follower.forget(name)
            self._send_lacks(stream, request, 0)

    def _send_lacks(self, stream: _Stream, request: pb.FollowRequest, num_tokens: int) -> None:
        lacks = pb.FollowReply(sequence=request.sequence, position=num_tokens, lacks=True)
        stream.send(lacks)

    def _follow(self, stream: _Stream, request: pb.FollowRequest, name: str, tell: Tell) -> None:
        tokens = list(request.token_ids)
        drawing = Drawing.from_pb(request.drawing) if request.HasField("drawing") else None
        self._follower.follow(name, request.num_before, tokens, tell, request.states, drawing)
        with suppress(errors.Cancelled):  # what is true comes next
            if not stream.waiting:
                self._follower.go_on(name, tell, partial(stream.check, request.sequence))


def _says(request: pb.FollowRequest, sequence: str, token: Token) -> bool:
    """Whether it names this token as the sequence's latest, and nothing else that is new."""
    is_next = request.sequence == sequence and request.num_before == token.position
    return is_next and list(request.token_ids) == [token.token_id]


def _tell(stream: _Stream, sequence: str, token: Token, layer: int, experts: list[int]) -> None:
    stream.send(
        pb.FollowReply(
            sequence=sequence,
            position=token.position,
            token_id=token.token_id,
            layer=layer,
            experts=experts,
        )
    )
