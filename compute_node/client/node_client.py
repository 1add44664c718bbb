"""What a Python user imports: text from a running node.

from compute_node.client.node_client import NodeClient

with NodeClient("unix:/path/to/run-dir/compute_node.sock") as node:
    for piece in node.generate("Once upon a time", max_tokens=64):
        print(piece.text, end="")
"""

from __future__ import annotations

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from compute_node.client import arguments
from compute_node.client.description import Description
from compute_node.client.generates import Generates
from compute_node.client.result import Generation, ScoredToken, scored_of
from proto import compute_node_pb2 as pb
from proto import compute_node_pb2_grpc as pb_grpc
from proto import errors, rpc
from proto import stats_pb2 as stats_pb
from proto.stats import Stats


class Scoring:
    """An iterator over the scored tokens of a text. Leaving early: call `cancel`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[ScoredToken]:
        """Raises the typed error the node ended with (proto/errors.py)."""
        try:
            for reply in self._call:
                yield scored_of(reply)
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    def cancel(self) -> None:
        """Tell the node to stop; it does so between layers."""
        self._call.cancel()


class NodeClient(Generates[Generation]):
    """A connection to one node. Use as a context manager, or call `close`."""

    def __init__(self, address: str, tls: rpc.TlsFiles | None = None) -> None:
        self._channel = rpc.connect(address, tls)
        self._stub = pb_grpc.ComputeNodeStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def _start(self, request: pb.GenerateRequest, timeout_s: float | None) -> Generation:
        return Generation(self._stub.Generate(request, timeout=timeout_s))

    def score(
        self,
        text: str | Sequence[int],
        *,
        max_tokens: int = 0,
        context_tokens: int = 0,
        route: str = "",
        check_every: int = 0,
        quality: str = "",
        timeout_s: float | None = None,
    ) -> Scoring:
        """How likely each token of a text is, computed one by one as decode does.

        text: text or token ids
        max_tokens: a longer text is cut to this many tokens; 0: never
        context_tokens: a longer text is scored in parts of this many; 0: 512
        route, quality: as in `generate`
        check_every: one of this many tokens is computed exactly, too, and compared; 0: none

        Raises InvalidRequest before anything is sent. Iterating raises what the node ends with.
        """
        request = pb.ScoreRequest(
            max_tokens=arguments.count_of("max_tokens", max_tokens),
            context_tokens=arguments.count_of("context_tokens", context_tokens),
            route=arguments.text_of("route", route),
            check_every=arguments.count_of("check_every", check_every),
            quality=arguments.text_of("quality", quality),
        )
        if isinstance(text, str):
            request.text = arguments.text_of("text", text)
        else:
            request.token_ids.ids.extend(arguments.ids_of("text", text))
        arguments.check_size(request)
        return Scoring(self._stub.Score(request, timeout=arguments.timeout_of(timeout_s)))

    def forward(self, request: pb.ForwardRequest, timeout_s: float | None = None) -> bytes:
        """One MoE layer's routed experts on raw arrays, as proto/compute_node.proto lays them
        out. Raises InvalidRequest, and what the node ends with.
        """
        arguments.check_size(request)
        try:
            return self._stub.Forward(
                request, timeout=arguments.timeout_of(timeout_s)
            ).hidden_states
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    def stats(self, timeout_s: float = 5.0) -> Stats:
        """What the node shows of itself, as in `stats().hits`; counters are since its start.

        Raises Unavailable, InvalidRequest, VersionMismatch.
        """
        deadline_s = arguments.timeout_of(timeout_s)
        try:
            return Stats.from_pb(self._stub.Stats(stats_pb.StatsRequest(), timeout=deadline_s))
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    def describe(self, timeout_s: float = 5.0) -> Description:
        """What the node serves. Raises Unavailable, InvalidRequest."""
        deadline_s = arguments.timeout_of(timeout_s)
        try:
            return Description.from_pb(
                self._stub.Describe(pb.NodeDescriptionRequest(), timeout=deadline_s)
            )
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None
