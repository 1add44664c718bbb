"""Names and shapes that every service speaks of, as frozen value types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from proto import expert_pb2 as pb
from proto.weight_format import EXACT, WeightFormat

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1} | {
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}


@dataclass(frozen=True, slots=True, order=True)
class ExpertKey:
    """Always (layer, expert), in that order; layer is the model's own number. Prints as L07E113."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}E{self.expert:03d}"

    @classmethod
    def from_pb(cls, message: pb.ExpertKey) -> ExpertKey:
        return cls(message.layer, message.expert)

    def to_pb(self) -> pb.ExpertKey:
        return pb.ExpertKey(layer=self.layer, expert=self.expert)


EXACT_VARIANT = "exact"


@dataclass(frozen=True, slots=True, order=True)
class RecordKey:
    """One record of an expert: its weights as `variant` keeps them.

    Every expert has a record of the `exact` variant, which is what the model computes with when
    nothing else is asked for: the checkpoint's weights as the store was packed. Prints as L07E113,
    another variant's as L07E113/int4.
    """

    expert: ExpertKey
    variant: str = EXACT_VARIANT

    def __hash__(self) -> int:
        """Of the numbers: a store looks a record up ten times for a lease."""
        return hash((self.expert.layer, self.expert.expert, self.variant))

    def __str__(self) -> str:
        return (
            str(self.expert) if self.variant == EXACT_VARIANT else f"{self.expert}/{self.variant}"
        )

    @classmethod
    def exact(cls, layer: int, expert: int) -> RecordKey:
        return cls(ExpertKey(layer, expert))

    @classmethod
    def from_pb(cls, message: pb.RecordKey) -> RecordKey:
        return cls(ExpertKey(message.layer, message.expert), message.variant or EXACT_VARIANT)

    def to_pb(self) -> pb.RecordKey:
        variant = "" if self.variant == EXACT_VARIANT else self.variant
        return pb.RecordKey(layer=self.expert.layer, expert=self.expert.expert, variant=variant)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of an expert, as the model's experts module names and shapes it (no expert
    axis), or as its weight format does.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def length_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @classmethod
    def from_pb(cls, message: pb.TensorLayout) -> TensorLayout:
        return cls(message.name, message.dtype, tuple(message.shape))

    def to_pb(self) -> pb.TensorLayout:
        return pb.TensorLayout(name=self.name, dtype=self.dtype, shape=self.shape)


Layouts = dict[int, tuple[TensorLayout, ...]]
"""Per model layer, the tensors of each of its experts."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How one variant's records keep an expert."""

    weight_format: WeightFormat
    layouts: Layouts

    def expert_bytes(self, layer: int) -> int:
        return sum(tensor.length_bytes for tensor in self.layouts[layer])

    @classmethod
    def from_pb(cls, message: pb.Variant) -> Variant:
        return cls(WeightFormat.from_pb(message.weight_format), _layouts_from_pb(message.layouts))

    def to_pb(self, name: str) -> pb.Variant:
        return pb.Variant(
            name=name,
            weight_format=self.weight_format.to_pb(),
            layouts=_layouts_to_pb(self.layouts),
        )


def _layouts_from_pb(messages: Iterable[pb.LayerLayout]) -> Layouts:
    return {
        message.layer: tuple(TensorLayout.from_pb(tensor) for tensor in message.tensors)
        for message in messages
    }


def _layouts_to_pb(layouts: Layouts) -> list[pb.LayerLayout]:
    return [
        pb.LayerLayout(layer=layer, tensors=[tensor.to_pb() for tensor in tensors])
        for layer, tensors in layouts.items()
    ]


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A weight outside the experts: where it lies and what its bytes hash to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    length_bytes: int
    checksum: int

    @classmethod
    def from_pb(cls, message: pb.DenseTensor) -> DenseTensor:
        return cls(
            message.name,
            message.dtype,
            tuple(message.shape),
            message.file,
            message.offset_bytes,
            message.length_bytes,
            message.checksum,
        )

    def to_pb(self) -> pb.DenseTensor:
        return pb.DenseTensor(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            file=self.file,
            offset_bytes=self.offset_bytes,
            length_bytes=self.length_bytes,
            checksum=self.checksum,
        )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What store, node and scheduler must agree on about a model.

    moe_layers: model layer numbers, ascending; evidence and advice number MoE layers 0..L-1 in
                this order
    layouts, weight_format: of the exact variant
    variants:   by name, what is kept beside it
    """

    fingerprint: str
    model_type: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    layouts: Layouts
    dense: tuple[DenseTensor, ...] = field(default=())
    weight_format: WeightFormat = EXACT
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def num_experts_total(self) -> int:
        return len(self.moe_layers) * self.num_experts

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.length_bytes for tensor in self.dense)

    def expert_bytes(self, layer: int) -> int:
        return self.variant(EXACT_VARIANT).expert_bytes(layer)

    def variant(self, name: str) -> Variant:
        """Raises KeyError for a variant that the model does not have."""
        if name == EXACT_VARIANT:
            return Variant(self.weight_format, self.layouts)
        return self.variants[name]

    @property
    def small_variant(self) -> str:
        """The one whose experts have the fewest bytes; the exact one where nothing is kept beside
        it.
        """
        layer = self.moe_layers[0]
        names = (EXACT_VARIANT, *self.variants)
        return min(names, key=lambda name: self.variant(name).expert_bytes(layer))

    @property
    def probe_keys(self) -> tuple[ExpertKey, ...]:
        """What a main node tries other boxes' processors out with: every store has these, one that
        has only a share of the experts, too.
        """
        return tuple(
            ExpertKey(layer, 0) for layer in sorted({*self.moe_layers[:1], *self.moe_layers[-1:]})
        )

    def contains(self, key: ExpertKey) -> bool:
        return key.layer in self.layouts and 0 <= key.expert < self.num_experts

    @classmethod
    def from_pb(cls, message: pb.ModelSpec) -> ModelSpec:
        return cls(
            fingerprint=message.fingerprint,
            model_type=message.model_type,
            moe_layers=tuple(message.moe_layers),
            num_experts=message.num_experts,
            top_k=message.top_k,
            layouts=_layouts_from_pb(message.layouts),
            dense=tuple(DenseTensor.from_pb(t) for t in message.dense),
            weight_format=WeightFormat.from_pb(message.weight_format),
            variants={each.name: Variant.from_pb(each) for each in message.variants},
        )

    def to_pb(self) -> pb.ModelSpec:
        return pb.ModelSpec(
            fingerprint=self.fingerprint,
            model_type=self.model_type,
            moe_layers=self.moe_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            layouts=_layouts_to_pb(self.layouts),
            dense=[t.to_pb() for t in self.dense],
            weight_format=self.weight_format.to_pb(),
            variants=[variant.to_pb(name) for name, variant in self.variants.items()],
        )
