"""One stream to a shadow node. The main node's compute thread says its tokens; threads of the link
send, receive, and connect again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc

from compute_node.boxes.channel import BoxChannel
from compute_node.boxes.work import bytes_of
from proto import errors, rpc
from proto import shadow_pb2 as pb
from proto import shadow_pb2_grpc as pb_grpc
from proto.expert import ModelSpec
from proto.stats import counter, gauge

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_CALL_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0


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
        self._channel = BoxChannel(address, tls)
        self._requests: queue.SimpleQueue[pb.FollowRequest | None] = queue.SimpleQueue()
        self._num_sent: dict[str, int] = {}  # tokens by sequence; any thread
        self._is_up, self._closing = threading.Event(), threading.Event()
        self._refusal: errors.FlashMoEError | None = None
        self._thread = threading.Thread(target=self._run, name=f"shadow {address}", daemon=True)

    def __enter__(self) -> ShadowLink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._requests.put(None)
        self._channel.close()
        self._thread.join(_CALL_S)

    @property
    @gauge("flashmoe_node_shadow_up", "Whether the shadow node follows", key="up")
    def is_up(self) -> bool:
        return self._is_up.is_set()

    def wait_up(self, timeout_s: float) -> bool:
        """Whether it follows by then. Raises VersionMismatch for a shadow of another model."""
        waits = int(timeout_s / _POLL_S)
        for _ in range(waits):
            if self._refusal is not None:
                raise self._refusal
            if self._is_up.wait(_POLL_S):
                return True
        return False

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

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            try:
                self._serve(pb_grpc.ShadowStub(self._channel.now))
            except (grpc.RpcError, errors.FlashMoEError) as error:
                self._refusal = error if isinstance(error, errors.VersionMismatch) else None
                reason = error.details() if isinstance(error, grpc.Call) else str(error)
                if not self._closing.is_set():
                    facts = {"shadow": self.address, "reason": reason}
                    logger.warning("shadow is away", extra=facts)
            if self._is_up.is_set():
                pause_s = _FIRST_PAUSE_S
            self._is_up.clear()
            self._closing.wait(pause_s)
            self._channel.renew()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self, stub: pb_grpc.ShadowStub) -> None:
        """One stream, from its beginning to its end. Raises RpcError, VersionMismatch."""
        self._check(stub.Describe(pb.ShadowDescriptionRequest(), timeout=_CALL_S))
        self._num_sent.clear()
        requests = self._requests = queue.SimpleQueue()
        replies = stub.Follow(_until_none(requests))
        try:
            self._refusal = None
            self._is_up.set()
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
        finally:
            requests.put(None)
            replies.cancel()

    def _check(self, described: pb.ShadowDescription) -> None:
        """Raises VersionMismatch."""
        if described.protocol_version != rpc.PROTOCOL_VERSION:
            raise errors.VersionMismatch(
                f"{self.address} speaks protocol {described.protocol_version}, this node "
                f"{rpc.PROTOCOL_VERSION}: update the older one"
            )
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


def _until_none(requests: queue.SimpleQueue[Any]) -> Iterator[pb.FollowRequest]:
    while (request := requests.get()) is not None:
        yield request
