"""One stream to a shadow node. The main node's compute thread says its tokens; threads of the link
send and receive.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from compute_node.boxes.connection import CALL_S, BoxConnection, opened
from compute_node.boxes.work import bytes_of
from proto import errors, rpc
from proto import shadow_pb2 as pb
from proto import shadow_pb2_grpc as pb_grpc
from proto.expert import ModelSpec
from proto.protocol import check_version
from proto.stats import counter, gauge

logger = logging.getLogger(__name__)


class Name(NamedTuple):
    """What the shadow's router of a layer chose for one token, at its place in a sequence.
    experts: ascending
    """

    sequence: str
    position: int
    token_id: int
    layer: int
    experts: Sequence[int]


@dataclass(frozen=True)
class State:
    """Keys and values, [heads, tokens, size], of a layer, by its place in the model, from one
    token on.
    """

    number: int
    start: int
    keys: Any
    values: Any

    def to_pb(self) -> pb.LayerState:
        return pb.LayerState(
            number=self.number,
            start=self.start,
            num_tokens=self.keys.shape[1],
            keys=bytes_of(self.keys),
            values=bytes_of(self.values),
        )


class ShadowLink:
    """To one shadow node. Use as a context manager; it connects in the background, and again
    whenever the stream breaks.

    hears: called on a thread of the link with what is named
    """

    bytes_sent: int = counter("flashmoe_node_shadow_bytes", "To the shadow node", key="bytes_sent")

    def __init__(
        self,
        address: str,
        spec: ModelSpec,
        vocab_size: int,
        hears: Callable[[Name], None],
        tls: rpc.TlsFiles | None = None,
    ) -> None:
        self.address = address
        self._spec, self._vocab_size, self._hears = spec, vocab_size, hears
        self._connection = BoxConnection("shadow", address, tls, pb_grpc.ShadowStub, self)
        self._requests: queue.SimpleQueue[pb.FollowRequest | None] = queue.SimpleQueue()
        self._num_sent: dict[str, int] = {}  # tokens by sequence; any thread

    def __enter__(self) -> ShadowLink:
        self._connection.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__()

    @property
    @gauge("flashmoe_node_shadow_up", "Whether the shadow node follows", key="up")
    def is_up(self) -> bool:
        return self._connection.is_up.is_set()

    def wait_up(self, timeout_s: float) -> bool:
        """Whether it follows by then. Raises VersionMismatch for a shadow of another model."""
        return self._connection.wait_up(timeout_s)

    def follow(
        self,
        sequence: str,
        token_ids: Sequence[int],
        states: Sequence[State] = (),
        drawing: pb.Drawing | None = None,
    ) -> None:
        """Say a sequence's tokens, as far as it has not heard them. Blocks for nothing. states: in
        the place of its own; drawing: of the token after these
        """
        if not self.is_up:
            return
        num_before = self._num_sent.get(sequence, 0)
        request = pb.FollowRequest(
            sequence=sequence,
            num_before=num_before,
            token_ids=token_ids[num_before:],
            states=[state.to_pb() for state in states],
            drawing=drawing,
        )
        self._num_sent[sequence] = len(token_ids)
        self.bytes_sent += request.ByteSize()
        self._requests.put(request)

    def num_heard(self, sequence: str) -> int:
        """How many of its tokens were said."""
        return self._num_sent.get(sequence, 0)

    def forget(self, sequence: str) -> None:
        """The sequence has ended."""
        if self._num_sent.pop(sequence, None) is not None:
            self._requests.put(pb.FollowRequest(sequence=sequence))

    def serve(self, stub: pb_grpc.ShadowStub) -> None:
        """Raises RpcError, VersionMismatch."""
        self._check(stub.Describe(pb.ShadowDescriptionRequest(), timeout=CALL_S))
        self._num_sent.clear()
        requests = self._requests = queue.SimpleQueue()
        with opened(stub.Follow, requests) as replies:
            self._connection.is_up.set()
            logger.info("shadow follows", extra={"shadow": self.address})
            for reply in replies:
                if reply.lacks:
                    self._num_sent[reply.sequence] = reply.position
                else:
                    self._hears(
                        Name(
                            reply.sequence,
                            reply.position,
                            reply.token_id,
                            reply.layer,
                            list(reply.experts),
                        )
                    )

    def ended(self) -> None:
        """Nothing waits for it."""

    def _check(self, described: pb.ShadowDescription) -> None:
        """Raises VersionMismatch."""
        check_version(self.address, described.protocol_version)
        spec = self._spec
        own = (spec.moe_layers, spec.num_experts, spec.top_k, self._vocab_size)
        its = (
            tuple(described.moe_layers),
            described.num_experts,
            described.top_k,
            described.vocab_size,
        )
        if its != own:
            raise errors.VersionMismatch(
                f"{self.address} is the shadow of another model: give it a store that was packed "
                "from the same checkpoint"
            )
