"""How a weight format writes an expert: the tensors of a record, and their bytes. Offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.formats.weight_source import WeightSource
from proto.expert import TensorLayout, Variant
from proto.weight_format import WeightFormat


class Encoder(Protocol):
    """One weight format's way to write an expert. contents: how matrices are kept, for a card"""

    weight_format: WeightFormat
    contents: str

    def layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        """The tensors that a record holds of `parameter`."""
        ...

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        """The bytes of each of these tensors, in pieces. Raises ManifestInvalid."""
        ...


def describe_variant(architecture: Architecture, encoder: Encoder) -> Variant:
    """Of records that `encoder` writes."""
    layouts = {
        layer: tuple(tensor for p in parameters for tensor in encoder.layout(p))
        for layer, parameters in architecture.layers.items()
    }
    return Variant(encoder.weight_format, layouts)
