"""Names and shapes that every service speaks of, as frozen value types."""

from __future__ import annotations

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
    layouts:    per model layer, the tensors of each of its experts
    """

    fingerprint: str
    model_type: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    layouts: dict[int, tuple[TensorLayout, ...]]
    dense: tuple[DenseTensor, ...] = field(default=())
    weight_format: WeightFormat = EXACT

    @property
    def num_experts_total(self) -> int:
        return len(self.moe_layers) * self.num_experts

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.length_bytes for tensor in self.dense)

    def expert_bytes(self, layer: int) -> int:
        return sum(tensor.length_bytes for tensor in self.layouts[layer])

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
            layouts={
                layout.layer: tuple(TensorLayout.from_pb(t) for t in layout.tensors)
                for layout in message.layouts
            },
            dense=tuple(DenseTensor.from_pb(t) for t in message.dense),
            weight_format=WeightFormat.from_pb(message.weight_format),
        )

    def to_pb(self) -> pb.ModelSpec:
        return pb.ModelSpec(
            fingerprint=self.fingerprint,
            model_type=self.model_type,
            moe_layers=self.moe_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            layouts=[
                pb.LayerLayout(layer=layer, tensors=[t.to_pb() for t in tensors])
                for layer, tensors in self.layouts.items()
            ],
            dense=[t.to_pb() for t in self.dense],
            weight_format=self.weight_format.to_pb(),
        )
