"""What a forward pass asked of the experts, as arrays: recorded for a client, or as evidence.

L counts MoE layers, K experts a token, E experts a layer. proto/access.proto says how they travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from proto import access_pb2 as pb
from proto import errors
from proto.foretold import Foretold
from proto.redis_schema import LAYER, POOL, VERSION, Fields

_MAX_LAYERS = 4096
_MAX_EXPERTS = 65_536
_MAX_TOP_K = 1024
_MAX_NAME = 256
_MAX_NUMBER = 1 << 63


@dataclass(frozen=True)
class RecordedStep:
    """What one decode step asked of the experts.

    topk_ids:      [L, K], in the router's order
    topk_weights:  [L, K], their gate weights; they need not sum to 1
    router_scores: [L, E], as the router gave them; None when not asked for
    foretold:      what predictors said before; None when not asked for
    """

    num_experts: int
    topk_ids: NDArray[np.uint16]
    topk_weights: NDArray[np.float16]
    router_scores: NDArray[np.float16] | None = None
    foretold: Foretold | None = None

    def to_pb(self) -> pb.StepAccess:
        num_layers, top_k = self.topk_ids.shape
        scores = self.router_scores
        return pb.StepAccess(
            num_layers=num_layers,
            top_k=top_k,
            num_experts=self.num_experts,
            topk_ids=self.topk_ids.astype("<u2", copy=False).tobytes(),
            topk_weights=self.topk_weights.astype("<f2", copy=False).tobytes(),
            router_scores=None if scores is None else scores.astype("<f2", copy=False).tobytes(),
            foretold=None if self.foretold is None else self.foretold.to_pb(),
        )

    @classmethod
    def from_pb(cls, message: pb.StepAccess) -> Self:
        """Raises MessageInvalid when the arrays have not the shape they are said to have."""
        chosen = message.num_layers, message.top_k
        scored = message.num_layers, message.num_experts
        has_scores = message.HasField("router_scores")
        return cls(
            message.num_experts,
            _array("topk_ids", message.topk_ids, "<u2", chosen),
            _array("topk_weights", message.topk_weights, "<f2", chosen),
            _array("router_scores", message.router_scores, "<f2", scored) if has_scores else None,
            _foretold(message.foretold, scored) if message.HasField("foretold") else None,
        )


def _foretold(message: pb.Foretold, shape: tuple[int, int]) -> Foretold:
    if (message.num_layers, message.num_experts) != shape:
        raise errors.MessageInvalid("field 'foretold' is of another model")
    return Foretold.from_pb(message)


@dataclass(frozen=True)
class DecodeAccess:
    """One decode step of one sequence.

    slots:        how many experts the node may hold, all layers together
    scope:        LAYER or POOL
    policy:       that chose the last victim
    topk_ids:     [L, K] uint16, distinct within a row
    topk_weights: [L, K] float16, gate weights; they need not sum to 1
    hits:         [L, K] bool, found in the node's cache
    gates:        [L, E] float16, each expert's share of the token's gates, chosen or not; None
                  where nothing goes by them
    """

    node: str
    sequence: str
    step: int
    num_experts: int
    slots: int
    scope: str
    policy: str
    time_ns: int
    topk_ids: NDArray[np.uint16]
    topk_weights: NDArray[np.float16]
    hits: NDArray[np.bool_]
    gates: NDArray[np.float16] | None = None

    def encode(self) -> Fields:
        """The fields of an entry of the stream."""
        access = RecordedStep(self.num_experts, self.topk_ids, self.topk_weights)
        decode = pb.DecodeEvidence(
            access=access.to_pb(),
            hits=np.packbits(self.hits).tobytes(),
            step=self.step,
            slots=self.slots,
            scope=self.scope,
            policy=self.policy,
            gates=None if self.gates is None else self.gates.astype("<f2", copy=False).tobytes(),
        )
        return _fields(
            pb.Evidence(node=self.node, sequence=self.sequence, time_ns=self.time_ns, decode=decode)
        )


@dataclass(frozen=True)
class PrefillAccess:
    """One prompt chunk of one sequence. token_counts: [L, E] uint32, tokens routed to each
    expert.
    """

    node: str
    sequence: str
    num_tokens: int
    time_ns: int
    token_counts: NDArray[np.uint32]

    def encode(self) -> Fields:
        """The fields of an entry of the stream."""
        num_layers, num_experts = self.token_counts.shape
        prefill = pb.PrefillEvidence(
            num_layers=num_layers,
            num_experts=num_experts,
            num_tokens=self.num_tokens,
            token_counts=self.token_counts.astype("<u4", copy=False).tobytes(),
        )
        return _fields(
            pb.Evidence(
                node=self.node, sequence=self.sequence, time_ns=self.time_ns, prefill=prefill
            )
        )


def _fields(evidence: pb.Evidence) -> Fields:
    return {"v": VERSION, "access": evidence.SerializeToString()}


def decode_access(fields: Mapping[bytes, bytes]) -> DecodeAccess | PrefillAccess:
    """The entry behind a stream's fields.

    Raises MessageInvalid for another version, what is no message, names that are too long, numbers
    that no model or node has, arrays of the wrong size, and values that no router gives.
    """
    if fields.get(b"v") != b"%d" % VERSION:
        raise errors.MessageInvalid("evidence has another version")
    try:
        evidence = pb.Evidence.FromString(fields.get(b"access", b""))
    except DecodeError as error:
        raise errors.MessageInvalid(f"evidence is no message ({error})") from error
    _check_names(node=evidence.node, sequence=evidence.sequence)
    _check_numbers(_MAX_NUMBER, time_ns=evidence.time_ns)
    match evidence.WhichOneof("kind"):
        case "decode":
            return _decode_step(evidence, evidence.decode)
        case "prefill":
            return _decode_prefill(evidence, evidence.prefill)
    raise errors.MessageInvalid("evidence of unknown kind")


def _decode_step(evidence: pb.Evidence, decode: pb.DecodeEvidence) -> DecodeAccess:
    _check_names(policy=decode.policy)
    _check_numbers(_MAX_NUMBER, step=decode.step, slots=decode.slots)
    if decode.scope not in (LAYER, POOL):
        raise errors.MessageInvalid(f"evidence of unknown scope {decode.scope!r}")
    access = _checked(decode.access)
    shape = access.topk_ids.shape
    if len(decode.hits) != -(-access.topk_ids.size // 8):
        raise errors.MessageInvalid("field 'hits' has the wrong size")
    hits = np.unpackbits(np.frombuffer(decode.hits, np.uint8), count=access.topk_ids.size)
    return DecodeAccess(
        node=evidence.node,
        sequence=evidence.sequence,
        step=decode.step,
        num_experts=access.num_experts,
        slots=decode.slots,
        scope=decode.scope,
        policy=decode.policy,
        time_ns=evidence.time_ns,
        topk_ids=access.topk_ids,
        topk_weights=access.topk_weights,
        hits=hits.astype(bool).reshape(shape),
        gates=_gates(decode, (shape[0], access.num_experts)),
    )


def _gates(decode: pb.DecodeEvidence, shape: tuple[int, int]) -> NDArray[np.float16] | None:
    if not decode.HasField("gates"):
        return None
    gates: NDArray[np.float16] = _array("gates", decode.gates, "<f2", shape)
    if not bool(((gates >= 0) & (gates <= 1)).all()):
        raise errors.MessageInvalid("gates are no shares within 0 and 1")
    return gates


def _checked(message: pb.StepAccess) -> RecordedStep:
    """What it says, if a router can have chosen so."""
    _check_shape(message.num_layers, message.num_experts)
    _check_numbers(_MAX_TOP_K, top_k=message.top_k)
    access = RecordedStep.from_pb(message)
    ids = access.topk_ids
    if ids.size and int(ids.max()) >= access.num_experts:
        raise errors.MessageInvalid("evidence names an expert the model does not have")
    in_order = np.sort(ids, axis=1)
    if bool((in_order[:, 1:] == in_order[:, :-1]).any()):
        raise errors.MessageInvalid("evidence names an expert twice in one layer")
    if not bool(np.isfinite(access.topk_weights).all()):
        raise errors.MessageInvalid("gate weights are not finite")
    return access


def _decode_prefill(evidence: pb.Evidence, prefill: pb.PrefillEvidence) -> PrefillAccess:
    _check_shape(prefill.num_layers, prefill.num_experts)
    _check_numbers(_MAX_NUMBER, num_tokens=prefill.num_tokens)
    shape = prefill.num_layers, prefill.num_experts
    return PrefillAccess(
        node=evidence.node,
        sequence=evidence.sequence,
        num_tokens=prefill.num_tokens,
        time_ns=evidence.time_ns,
        token_counts=_array("token_counts", prefill.token_counts, "<u4", shape),
    )


def _check_shape(num_layers: int, num_experts: int) -> None:
    _check_numbers(_MAX_LAYERS, num_layers=num_layers)
    _check_numbers(_MAX_EXPERTS, num_experts=num_experts)


def _check_numbers(limit: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value > limit:
            raise errors.MessageInvalid(f"field {name!r} is {value}, more than {limit}")


def _check_names(**names: str) -> None:
    for name, text in names.items():
        if len(text.encode()) > _MAX_NAME:
            raise errors.MessageInvalid(f"field {name!r} has {len(text.encode())} bytes")


def _array(name: str, data: bytes, dtype: str, shape: tuple[int, int]) -> Any:
    if len(data) != shape[0] * shape[1] * np.dtype(dtype).itemsize:
        raise errors.MessageInvalid(f"field {name!r} has {len(data)} bytes, not {shape}")
    return np.frombuffer(data, dtype).reshape(shape)
