"""What a Python user imports: text from a running node.

from compute_node.client import NodeClient

with NodeClient("unix:/path/to/run-dir/compute_node.sock") as node:
    for piece in node.generate("Once upon a time", max_tokens=64):
        print(piece.text, end="")
"""

from __future__ import annotations

import proto.quiet_grpc  # noqa: F401  isort: skip  before grpc

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from compute_node.result import Generation
from proto import compute_node_pb2 as pb
from proto import compute_node_pb2_grpc as pb_grpc
from proto import errors, rpc


@dataclass(frozen=True)
class ScoredToken:
    """log_prob: natural logarithm of its probability, given what came before it in its piece"""

    token_id: int
    log_prob: float


class Scoring:
    """An iterator over the scored tokens of a text. Leaving early: call `cancel`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[ScoredToken]:
        """Raises the typed error the node ended with (proto/errors.py)."""
        try:
            for reply in self._call:
                yield ScoredToken(reply.id, reply.log_prob)
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    def cancel(self) -> None:
        """Tell the node to stop; it does so between layers."""
        self._call.cancel()


class NodeClient:
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

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        repetition_penalty: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        max_prompt_tokens: int = 0,
        record: bool = False,
        router_scores: bool = False,
        timeout_s: float | None = None,
    ) -> Generation:
        """Start generating.

        prompt: text, token ids, or chat messages ({"role": ..., "content": ...})
        temperature: 0 is greedy, and exact
        max_prompt_tokens: a longer prompt is cut to its first so many tokens; 0: never
        record: keep what each decode step asked of the experts, in `Result.steps`
        router_scores: record the router's scores of all experts, too
        """
        request = pb.GenerateRequest(
            max_tokens=max_tokens,
            sampling=pb.Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            ),
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            max_prompt_tokens=max_prompt_tokens,
            recording=pb.Recording(router_scores=router_scores) if record else None,
        )
        _set_input(request, prompt)
        return Generation(self._stub.Generate(request, timeout=timeout_s))

    def score(
        self,
        text: str | Sequence[int],
        *,
        max_tokens: int = 0,
        context_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> Scoring:
        """How likely each token of a text is, computed one by one as decode does.

        text: text or token ids
        max_tokens: a longer text is cut to its first so many tokens; 0: never
        context_tokens: a longer text is scored in pieces of so many; 0: 512
        """
        request = pb.ScoreRequest(max_tokens=max_tokens, context_tokens=context_tokens)
        if isinstance(text, str):
            request.text = text
        else:
            request.token_ids.ids.extend(text)
        return Scoring(self._stub.Score(request, timeout=timeout_s))

    def forward(self, request: pb.ForwardRequest, timeout_s: float | None = None) -> bytes:
        """One MoE layer's routed experts on raw arrays, as proto/compute_node.proto lays them
        out.
        """
        try:
            return self._stub.Forward(request, timeout=timeout_s).hidden_states
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    def stats(self, timeout_s: float = 5.0) -> pb.NodeStatsReply:
        """Counters since the node started. Raises Unavailable."""
        try:
            return self._stub.Stats(pb.NodeStatsRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None


def _set_input(
    request: pb.GenerateRequest, prompt: str | Sequence[int] | Sequence[dict[str, str]]
) -> None:
    if isinstance(prompt, str):
        request.prompt = prompt
        return
    for item in prompt:
        if isinstance(item, dict):
            request.chat.messages.add(role=item["role"], content=item["content"])
        else:
            request.token_ids.ids.append(item)
