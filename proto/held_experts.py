"""Which of a model's experts a store has, as a value and on the wire."""

from __future__ import annotations

from dataclasses import dataclass

from proto import errors
from proto.expert import ExpertKey, ModelSpec


@dataclass(frozen=True, slots=True)
class HeldExperts:
    """keys: None: all that there are"""

    keys: frozenset[ExpertKey] | None = None

    @property
    def is_all(self) -> bool:
        return self.keys is None

    def __contains__(self, key: ExpertKey, /) -> bool:
        return self.keys is None or key in self.keys

    def num(self, spec: ModelSpec) -> int:
        """How many of the model's."""
        return spec.num_experts_total if self.keys is None else len(self.keys)

    def to_bytes(self, spec: ModelSpec) -> bytes:
        """A bit an expert, layer by layer in the order of `moe_layers`, the lowest bit of a byte
        first. Empty: all.
        """
        if self.keys is None:
            return b""
        bits = sum(1 << number for number, key in enumerate(_keys(spec)) if key in self.keys)
        return bits.to_bytes(_num_bytes(spec), "little")

    @classmethod
    def from_bytes(cls, data: bytes, spec: ModelSpec) -> HeldExperts:
        """Raises MessageInvalid for bytes that are not of as many experts."""
        if not data:
            return ALL_EXPERTS
        bits = int.from_bytes(data, "little")
        if len(data) != _num_bytes(spec) or bits >> spec.num_experts_total:
            raise errors.MessageInvalid(
                f"{len(data)} bytes do not say which of {spec.num_experts_total} experts a store "
                "has: update the older program"
            )
        held = frozenset(key for number, key in enumerate(_keys(spec)) if bits >> number & 1)
        return cls(held)


ALL_EXPERTS = HeldExperts()


def _keys(spec: ModelSpec) -> list[ExpertKey]:
    return [ExpertKey(layer, e) for layer in spec.moe_layers for e in range(spec.num_experts)]


def _num_bytes(spec: ModelSpec) -> int:
    return -(-spec.num_experts_total // 8)
