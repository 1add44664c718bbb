"""What a record holds of each parameter of an expert, by weight format. Offline, imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.parameters import TORCH_DTYPES, ExpertParameter
from expert_store.offline.checkpoint.progress import Report
from expert_store.offline.formats import lossless, quantise
from expert_store.offline.formats.weight_source import WeightSource
from proto import errors
from proto.expert import TensorLayout, Variant
from proto.weight_format import (
    EXACT,
    INT4_GROUPS,
    WeightFormat,
    lossless_tensors,
    low_bit_tensors,
)


class Encoder(Protocol):
    """One weight format's way to write an expert."""

    weight_format: WeightFormat

    def layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        """The tensors that a record holds of `parameter`."""
        ...

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        """The bytes of each of these tensors, in pieces. Raises ManifestInvalid."""
        ...


class ExactEncoder:
    """The checkpoint's own bytes, streamed."""

    weight_format = EXACT

    def layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        return (TensorLayout(parameter.name, parameter.dtype, parameter.shape),)

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        yield source.chunks(parameter.parts[expert])


class MatrixEncoder(ExactEncoder, ABC):
    """Matrices in another way, biases as they are; holds one matrix at a time."""

    def layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        return self._layout(parameter) if parameter.is_matrix else super().layout(parameter)

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        if not parameter.is_matrix:
            yield from super().encode(parameter, expert, source)
            return
        for tensor in self._tensors(parameter, source.matrix(parameter, expert)):
            yield [tensor.contiguous().view(torch.uint8).numpy().tobytes()]

    @abstractmethod
    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]: ...

    @abstractmethod
    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        """matrix: [N, K]"""


class Bf16Encoder(MatrixEncoder):
    """The module's own shape, in bf16."""

    def __init__(self, architecture: Architecture) -> None:
        same = all(p.encoding == "mxfp4" or p.dtype == "BF16" for p in _matrices(architecture))
        self.weight_format = WeightFormat("bf16", lossy=not same)

    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        return (TensorLayout(parameter.name, "BF16", parameter.shape),)

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        yield (matrix.T if parameter.is_transposed else matrix).to(torch.bfloat16)


class LowBitEncoder(MatrixEncoder):
    """Codes and what gives them back: see proto/weight_format.py."""

    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        described = low_bit_tensors(
            self.weight_format, *_outputs_and_inputs(parameter), parameter.dtype
        )
        return tuple(
            TensorLayout(parameter.name + suffix, dtype, shape)
            for suffix, dtype, shape in described
        )


class LosslessEncoder(MatrixEncoder):
    """bf16 in twelve bits a number. Goes through all experts twice: a record has room for as many
    outliers as the matrix of its kind with most of them.
    """

    weight_format = WeightFormat("lossless")

    def __init__(self, architecture: Architecture, source: WeightSource, report: Report) -> None:
        self._room: dict[ExpertParameter, int] = {}
        matrices = _matrices(architecture)
        _check_bf16(matrices)
        sizes_bytes = [2 * prod(p.shape) * architecture.num_experts for p in matrices]
        for number, parameter in enumerate(matrices, 1):
            counts = [
                lossless.count_outliers(source.matrix(parameter, expert))
                for expert in range(architecture.num_experts)
            ]
            self._room[parameter] = max(1, *counts)
            report(sum(sizes_bytes[:number]), sum(sizes_bytes))
        self._check_gain(matrices)

    def _check_gain(self, matrices: Sequence[ExpertParameter]) -> None:
        plain_bytes = sum(2 * prod(parameter.shape) for parameter in matrices)
        packed_bytes = sum(t.length_bytes for p in matrices for t in self._layout(p))
        if packed_bytes >= plain_bytes:
            raise errors.CheckpointUnsupported(
                f"lossless would take {packed_bytes / plain_bytes:.3f} of the experts' bytes: pack "
                "them with --format exact"
            )

    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        described = lossless_tensors(*_outputs_and_inputs(parameter), self._room[parameter])
        return tuple(
            TensorLayout(parameter.name + suffix, dtype, shape)
            for suffix, dtype, shape in described
        )

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        return lossless.encode(matrix, self._room[parameter])


class Int8Encoder(LowBitEncoder):
    """A scale for each output."""

    weight_format = WeightFormat("int8", lossy=True)

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        return quantise.int8(matrix, TORCH_DTYPES[parameter.dtype])


class Int4Encoder(LowBitEncoder):
    """A scale and a zero for each group of inputs."""

    def __init__(self, architecture: Architecture) -> None:
        inputs = {_outputs_and_inputs(p)[1] for p in _matrices(architecture)}
        fitting = [g for g in INT4_GROUPS if all(count % g == 0 for count in inputs)]
        group = fitting[0] if fitting else INT4_GROUPS[-1]
        self.weight_format = WeightFormat("int4", group, quantise.int4_layout(), lossy=True)

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        group, layout = self.weight_format.group, self.weight_format.layout
        return quantise.int4(matrix, group, layout, TORCH_DTYPES[parameter.dtype])


def describe_variant(architecture: Architecture, encoder: Encoder) -> Variant:
    """Of records that `encoder` writes."""
    layouts = {
        layer: tuple(tensor for p in parameters for tensor in encoder.layout(p))
        for layer, parameters in architecture.layers.items()
    }
    return Variant(encoder.weight_format, layouts)


def make_encoder(
    name: str, architecture: Architecture, source: WeightSource, report: Report
) -> Encoder:
    """`report` hears of matrices looked through beforehand, where the format needs it.

    Raises CheckpointUnsupported when the checkpoint cannot be packed so, ManifestInvalid for a
    damaged source.
    """
    if name == "exact":
        check_plain(architecture, "pack it with --format bf16 (the same values) or int4")
        return ExactEncoder()
    if name == "lossless":
        return LosslessEncoder(architecture, source, report)
    if name == "bf16":
        return Bf16Encoder(architecture)
    return Int8Encoder() if name == "int8" else Int4Encoder(architecture)


def check_plain(architecture: Architecture, remedy: str) -> None:
    """Raises CheckpointUnsupported when experts are not stored as what they are multiplied as."""
    if any(p.encoding != "plain" for p in _matrices(architecture)):
        raise errors.CheckpointUnsupported(
            f"its experts are mxfp4 blocks on disk, which no kernel here multiplies with: {remedy}"
        )


def _check_bf16(matrices: list[ExpertParameter]) -> None:
    if any(p.encoding != "plain" or p.dtype != "BF16" for p in matrices):
        raise errors.CheckpointUnsupported(
            "lossless is for bf16 experts, this checkpoint has them otherwise: pack it with "
            "--format bf16 or exact"
        )


def _matrices(architecture: Architecture) -> list[ExpertParameter]:
    return [p for layer in architecture.layers.values() for p in layer if p.is_matrix]


def _outputs_and_inputs(parameter: ExpertParameter) -> tuple[int, int]:
    first, second = parameter.shape
    return (second, first) if parameter.is_transposed else (first, second)
