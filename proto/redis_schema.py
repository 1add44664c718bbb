"""Every Redis key, stream, field and time to live, with its one writer and one reader.

Evidence (stream): writer compute_node.evidence.log, reader scheduler.daemon.access_stream.
Advice (string with a time to live): writer scheduler.daemon.publisher,
reader compute_node.evidence.advice.
Arrays are packed little endian; L counts MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from proto import errors

VERSION = 4
LAYER, POOL = "layer", "pool"  # scopes: slots divided by layer, or shared by all layers

# Eviction policies: who decides, by name. A node ranks by its own books, or by scores it is sent.
PolicySetting = Literal["auto", "lru", "lfu", "lfru", "decayed", "importance", "river", "learned"]
AUTO = "auto"  # the one that the latest advice names
ADVISED_POLICIES = ("river", "learned")  # advice carries their scores
FALLBACK_POLICY = "decayed"  # without advice that can be followed
IMPORTANCE_POLICY = "importance"  # ranks by gates, which nodes keep and send where it may decide

SCHEDULER_GROUP = "scheduler"
ACCESS_STREAM_BYTES = 4 * 1024 * 1024
VALKEY_MAX_MEMORY = "64mb"

Fields = dict[str | bytes, Any]


def access_stream(fingerprint: str) -> str:
    return f"flashmoe:{fingerprint}:access"


def advice_key(fingerprint: str, node: str) -> str:
    return f"flashmoe:{fingerprint}:advice:{node}"


def access_stream_maxlen(entry_bytes: int) -> int:
    """How many entries of this size fit the stream's budget."""
    return max(64, ACCESS_STREAM_BYTES // max(1, entry_bytes))


@dataclass(frozen=True)
class Advice:
    """What one node should keep.

    scores:        [L, E] float32 in [0, 1], or None when a local policy is in charge
    unused_scores: [L, E] likewise, of an expert that its layer's next step does not use; None when
                   the policy does not say
    as_of_ns:      `time_ns` of the newest step that the scores know
    """

    policy: str
    version: int
    time_ns: int
    lifetime_s: float
    scores: NDArray[np.float32] | None = field(default=None)
    unused_scores: NDArray[np.float32] | None = field(default=None)
    as_of_ns: int = 0

    def is_fresh(self, now_ns: int) -> bool:
        return now_ns - self.time_ns <= self.lifetime_s * 1e9

    def encode(self) -> bytes:
        policy = self.policy.encode()
        shape = self.scores.shape if self.scores is not None else (0, 0)
        tables = [table for table in (self.scores, self.unused_scores) if table is not None]
        times_ns = (self.time_ns, self.as_of_ns)
        head = _ADVICE.pack(
            VERSION, len(policy), len(tables), *shape, self.version, *times_ns, self.lifetime_s
        )
        return head + policy + b"".join(table.astype("<f4").tobytes() for table in tables)

    @classmethod
    def decode(cls, data: bytes) -> Advice:
        """Raises MessageInvalid for another version, a wrong size, or scores outside [0, 1]."""
        if len(data) < _ADVICE.size:
            raise errors.MessageInvalid(f"advice has {len(data)} bytes, no room for its header")
        version, name_bytes, tables, layers, experts, number, time_ns, as_of_ns, life = (
            _ADVICE.unpack_from(data)
        )
        if version != VERSION:
            raise errors.MessageInvalid(f"advice has version {version}, we speak {VERSION}")
        num_scores = tables * layers * experts
        is_sound = num_scores > 0 or tables == layers == experts == 0
        if tables > 2 or not is_sound or len(data) != _ADVICE.size + name_bytes + num_scores * 4:
            raise errors.MessageInvalid("advice has the wrong size")
        if not 0 <= life < 1e9:
            raise errors.MessageInvalid("advice has an impossible lifetime")
        body = _ADVICE.size + name_bytes
        sent = np.frombuffer(data, "<f4", offset=body).reshape(tables, layers, experts)
        if not bool(np.all((sent >= 0) & (sent <= 1))):  # also refuses NaN
            raise errors.MessageInvalid("advice has scores outside [0, 1]")
        scores, unused_scores = [*sent, None, None][:2]
        policy = _utf8(data[_ADVICE.size : body], "policy")
        return cls(policy, number, time_ns, life, scores, unused_scores, as_of_ns)


_ADVICE = struct.Struct("<IIIIIQQQd")


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise errors.MessageInvalid(f"field {name!r} is not text") from error
