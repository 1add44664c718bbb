"""Every Redis key, stream, field and time to live, with its one writer and one reader.

Evidence (stream): writer compute_node.evidence.log, reader scheduler.daemon.access_stream.
Advice (string with a time to live): writer scheduler.daemon.publisher,
reader compute_node.evidence.advice.
Arrays are packed little endian; L counts MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from proto import errors

VERSION = 2
LAYER, POOL = "layer", "pool"  # scopes: slots divided by layer, or shared by all layers

# Eviction policies: who decides, by name. A node ranks by its own books, or by scores it is sent.
PolicySetting = Literal["auto", "lru", "lfu", "lfru", "decayed", "river", "learned"]
AUTO = "auto"  # the one that the latest advice names
ADVISED_POLICIES = ("river", "learned")  # advice carries their scores
FALLBACK_POLICY = "decayed"  # without advice that can be followed

SCHEDULER_GROUP = "scheduler"
ACCESS_STREAM_BYTES = 16 * 1024 * 1024
VALKEY_MAX_MEMORY = "64mb"

_MAX_LAYERS = 4096
_MAX_EXPERTS = 65_536
_MAX_TOP_K = 1024
_MAX_NAME = 256

Fields = dict[str | bytes, Any]


def access_stream(fingerprint: str) -> str:
    return f"flashmoe:{fingerprint}:access"


def advice_key(fingerprint: str, node: str) -> str:
    return f"flashmoe:{fingerprint}:advice:{node}"


def access_stream_maxlen(entry_bytes: int) -> int:
    """How many entries of this size fit the stream's budget."""
    return max(64, ACCESS_STREAM_BYTES // max(1, entry_bytes))


@dataclass(frozen=True)
class DecodeAccess:
    """One decode step of one sequence.

    slots:        how many experts the node may hold, all layers together
    scope:        LAYER or POOL
    policy:       that chose the last victim
    topk_ids:     [L, K] uint16, distinct within a row
    topk_weights: [L, K] float16, gate weights; they need not sum to 1
    hits:         [L, K] bool, found in the node's cache
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

    def encode(self) -> Fields:
        num_layers, top_k = self.topk_ids.shape
        return {
            "v": VERSION,
            "kind": "decode",
            "node": self.node,
            "seq": self.sequence,
            "step": self.step,
            "experts": self.num_experts,
            "slots": self.slots,
            "scope": self.scope,
            "policy": self.policy,
            "time_ns": self.time_ns,
            "layers": num_layers,
            "k": top_k,
            "ids": self.topk_ids.astype("<u2").tobytes(),
            "weights": self.topk_weights.astype("<f2").tobytes(),
            "hits": np.packbits(self.hits).tobytes(),
        }


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
        num_layers, num_experts = self.token_counts.shape
        return {
            "v": VERSION,
            "kind": "prefill",
            "node": self.node,
            "seq": self.sequence,
            "tokens": self.num_tokens,
            "time_ns": self.time_ns,
            "layers": num_layers,
            "experts": num_experts,
            "counts": self.token_counts.astype("<u4").tobytes(),
        }


def decode_access(fields: Mapping[bytes, bytes]) -> DecodeAccess | PrefillAccess:
    """The entry behind a stream's fields.

    Raises MessageInvalid for missing fields, another version, or arrays of the wrong size.
    """
    if _number(fields, "v", 1 << 16) != VERSION:
        raise errors.MessageInvalid("evidence has another version")
    kind = _text(fields, "kind")
    if kind == "decode":
        return _decode_step(fields)
    if kind == "prefill":
        return _decode_prefill(fields)
    raise errors.MessageInvalid(f"evidence of unknown kind {kind!r}")


def _decode_step(fields: Mapping[bytes, bytes]) -> DecodeAccess:
    shape = _number(fields, "layers", _MAX_LAYERS), _number(fields, "k", _MAX_TOP_K)
    num_experts = _number(fields, "experts", _MAX_EXPERTS)
    topk_ids: NDArray[np.uint16] = _array(fields, "ids", "<u2", shape)
    if topk_ids.size and int(topk_ids.max()) >= num_experts:
        raise errors.MessageInvalid("evidence names an expert the model does not have")
    in_order = np.sort(topk_ids, axis=1)
    if bool((in_order[:, 1:] == in_order[:, :-1]).any()):
        raise errors.MessageInvalid("evidence names an expert twice in one layer")
    bits = _bytes(fields, "hits")
    if len(bits) != -(-shape[0] * shape[1] // 8):
        raise errors.MessageInvalid("field 'hits' has the wrong size")
    hits = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1])
    return DecodeAccess(
        node=_text(fields, "node"),
        sequence=_text(fields, "seq"),
        step=_number(fields, "step"),
        num_experts=num_experts,
        slots=_number(fields, "slots"),
        scope=_scope(fields),
        policy=_text(fields, "policy"),
        time_ns=_number(fields, "time_ns"),
        topk_ids=topk_ids,
        topk_weights=_finite(_array(fields, "weights", "<f2", shape)),
        hits=hits.astype(bool).reshape(shape),
    )


def _decode_prefill(fields: Mapping[bytes, bytes]) -> PrefillAccess:
    shape = _number(fields, "layers", _MAX_LAYERS), _number(fields, "experts", _MAX_EXPERTS)
    return PrefillAccess(
        node=_text(fields, "node"),
        sequence=_text(fields, "seq"),
        num_tokens=_number(fields, "tokens"),
        time_ns=_number(fields, "time_ns"),
        token_counts=_array(fields, "counts", "<u4", shape),
    )


@dataclass(frozen=True)
class Advice:
    """What one node should keep. scores: [L, E] float32 in [0, 1], or None when a local policy
    is in charge.
    """

    policy: str
    version: int
    time_ns: int
    lifetime_s: float
    scores: NDArray[np.float32] | None = field(default=None)

    def is_fresh(self, now_ns: int) -> bool:
        return now_ns - self.time_ns <= self.lifetime_s * 1e9

    def encode(self) -> bytes:
        policy = self.policy.encode()
        shape = self.scores.shape if self.scores is not None else (0, 0)
        head = _ADVICE.pack(
            VERSION, len(policy), *shape, self.version, self.time_ns, self.lifetime_s
        )
        body = self.scores.astype("<f4").tobytes() if self.scores is not None else b""
        return head + policy + body

    @classmethod
    def decode(cls, data: bytes) -> Advice:
        """Raises MessageInvalid for another version, a wrong size, or scores outside [0, 1]."""
        if len(data) < _ADVICE.size:
            raise errors.MessageInvalid(f"advice has {len(data)} bytes, no room for its header")
        version, name_bytes, layers, experts, number, time_ns, life = _ADVICE.unpack_from(data)
        if version != VERSION:
            raise errors.MessageInvalid(f"advice has version {version}, we speak {VERSION}")
        if len(data) != _ADVICE.size + name_bytes + layers * experts * 4:
            raise errors.MessageInvalid("advice has the wrong size")
        if not 0 <= life < 1e9:
            raise errors.MessageInvalid("advice has an impossible lifetime")
        body = _ADVICE.size + name_bytes
        scores = None
        if layers * experts:
            scores = np.frombuffer(data, "<f4", offset=body).reshape(layers, experts)
            if not bool(np.all((scores >= 0) & (scores <= 1))):  # also refuses NaN
                raise errors.MessageInvalid("advice has scores outside [0, 1]")
        return cls(_utf8(data[_ADVICE.size : body], "policy"), number, time_ns, life, scores)


_ADVICE = struct.Struct("<IIIIQQd")


def _bytes(fields: Mapping[bytes, bytes], name: str) -> bytes:
    value = fields.get(name.encode())
    if value is None:
        raise errors.MessageInvalid(f"field {name!r} is missing")
    return value


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise errors.MessageInvalid(f"field {name!r} is not text") from error


def _text(fields: Mapping[bytes, bytes], name: str) -> str:
    data = _bytes(fields, name)
    if len(data) > _MAX_NAME:
        raise errors.MessageInvalid(f"field {name!r} has {len(data)} bytes")
    return _utf8(data, name)


def _scope(fields: Mapping[bytes, bytes]) -> str:
    scope = _text(fields, "scope")
    if scope not in (LAYER, POOL):
        raise errors.MessageInvalid(f"evidence of unknown scope {scope!r}")
    return scope


def _number(fields: Mapping[bytes, bytes], name: str, limit: int = 1 << 63) -> int:
    data = _bytes(fields, name)
    if not (0 < len(data) <= 20 and data.isdigit()):
        raise errors.MessageInvalid(f"field {name!r} is not a count")
    value = int(data)
    if value > limit:
        raise errors.MessageInvalid(f"field {name!r} is {value}, more than {limit}")
    return value


def _array(fields: Mapping[bytes, bytes], name: str, dtype: str, shape: tuple[int, int]) -> Any:
    data = _bytes(fields, name)
    if len(data) != shape[0] * shape[1] * np.dtype(dtype).itemsize:
        raise errors.MessageInvalid(f"field {name!r} has {len(data)} bytes, not {shape}")
    return np.frombuffer(data, dtype).reshape(shape)


def _finite(values: NDArray[np.float16]) -> NDArray[np.float16]:
    if not bool(np.isfinite(values).all()):
        raise errors.MessageInvalid("gate weights are not finite")
    return values
