"""The client of programs that run an event loop.

async with AsyncNodeClient("unix:/path/to/run-dir/compute_node.sock") as node:
    async for piece in node.generate("Once upon a time", max_tokens=64):
        print(piece.text, end="")
"""

from __future__ import annotations

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc

from collections.abc import AsyncIterator, Awaitable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compute_node.client import arguments
from compute_node.client.description import Description
from compute_node.client.generates import Generates
from compute_node.client.result import Collected, Piece, Result
from proto import compute_node_pb2 as pb
from proto import compute_node_pb2_grpc as pb_grpc
from proto import errors, rpc
from proto import stats_pb2 as stats_pb
from proto.stats import Stats

Reply = TypeVar("Reply")


class AsyncGeneration(Collected):
    """An asynchronous iterator over pieces; `result` is there once it is exhausted. Leaving early:
    call `cancel`.
    """

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises the typed error the node ended with (proto/errors.py)."""
        try:
            async for reply in self._call:
                piece = self._take(reply)
                if piece is not None:
                    yield piece
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    async def run(self) -> Result:
        """Exhaust the iterator and return the result. Raises as iterating does."""
        async for _ in self:
            pass
        return self.whole()


class AsyncNodeClient(Generates[AsyncGeneration]):
    """A connection to one node, of the event loop that runs when it is made. Use as a context
    manager, or call `close`.
    """

    def __init__(self, address: str, tls: rpc.TlsFiles | None = None) -> None:
        self._channel = rpc.connect_aio(address, tls)
        self._stub: Any = pb_grpc.ComputeNodeStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    def _start(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncGeneration:
        return AsyncGeneration(self._stub.Generate(request, timeout=timeout_s))

    async def stats(self, timeout_s: float = 5.0) -> Stats:
        """As NodeClient.stats."""
        deadline_s = arguments.timeout_of(timeout_s)
        call = self._stub.Stats(stats_pb.StatsRequest(), timeout=deadline_s)
        return Stats.from_pb(await _reply(call))

    async def describe(self, timeout_s: float = 5.0) -> Description:
        """As NodeClient.describe."""
        deadline_s = arguments.timeout_of(timeout_s)
        call = self._stub.Describe(pb.NodeDescriptionRequest(), timeout=deadline_s)
        return Description.from_pb(await _reply(call))

    async def is_serving(self, timeout_s: float = 5.0) -> bool:
        """Whether the node is there and takes requests."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        request = health_pb2.HealthCheckRequest()
        try:
            reply = await stub.Check(request, timeout=arguments.timeout_of(timeout_s))
        except grpc.RpcError:
            return False
        return bool(reply.status == rpc.SERVING)


async def _reply(call: Awaitable[Reply]) -> Reply:
    try:
        return await call
    except grpc.RpcError as error:
        raise errors.from_rpc(error) from None
