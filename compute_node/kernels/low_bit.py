"""Products with low-bit weights: by a low-bit kernel for few tokens, dequantised for many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import matrices, scratch
from compute_node.store.memory import TORCH_DTYPES
from proto import errors
from proto.expert import ModelSpec, TensorLayout
from proto.weight_format import (
    BLOCK_ROWS,
    INT4_OUTPUTS,
    SCALE,
    SCALE_ZERO,
    WeightFormat,
    low_bit_tensors,
)


class LowBit(Protocol):
    """How one weight format's matrices are multiplied with; proto/weight_format.py lays them out.

    few_tokens: up to this many, the low-bit kernel is faster than dequantising (tests/bench/LOG.md)
    """

    few_tokens: int
    codes_per_byte: int

    def multiply(self, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        """inputs [t, K] with matrix `name`, [t, N]; padding included in both."""
        ...

    def dequantise(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """Matrix `name` as [K, N] in the dtype of its scales, padding included; valid until the
        next on this thread.
        """
        ...


@dataclass
class Int8:
    """A code and a scale a row."""

    few_tokens: int = 31
    codes_per_byte: int = 1

    def multiply(self, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(inputs, tensors[name], tensors[name + SCALE])

    def dequantise(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        codes, scale = tensors[name], tensors[name + SCALE]  # [N, K], [N]
        return scratch.empty(codes.shape, scale.dtype).copy_(codes).mul_(scale[:, None]).T


@dataclass
class Int4:
    """Codes, and a scale and a zero a group."""

    block_rows: int
    few_tokens: int = 96
    codes_per_byte: int = 2

    def multiply(self, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        codes, scale_zero = tensors[name], tensors[name + SCALE_ZERO]
        group = codes.shape[1] * 2 // scale_zero.shape[0]
        return torch._weight_int4pack_mm_for_cpu(inputs, codes, group, scale_zero)

    def dequantise(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        codes, scale_zero = tensors[name], tensors[name + SCALE_ZERO]  # [N, K / 2], [K / G, N, 2]
        num_outputs, num_inputs = codes.shape[0], codes.shape[1] * 2
        scale, zero = scale_zero.unbind(-1)  # [K / G, N]
        shape = (num_inputs, num_outputs // self.block_rows, self.block_rows)
        weight = scratch.empty(shape, scale_zero.dtype)
        self._unpack(codes, weight.transpose(0, 1))
        grouped = weight.view(scale.shape[0], -1, num_outputs)  # [K / G, G, N]
        # One rounding, as in the low-bit kernel; contiguous factors are five times faster.
        factors = zero.contiguous()[:, None], scale.contiguous()[:, None]
        torch.addcmul(factors[0], grouped, factors[1], out=grouped)
        return grouped.view(num_inputs, num_outputs)

    def _unpack(self, packed: Tensor, codes: Tensor) -> None:
        """packed: [N, K / 2]; codes: [N / B, K, B], to be filled with numbers from -8 to 7."""
        half = self.block_rows // 2
        blocks = packed.view(-1, codes.shape[1], half)  # [N / B, K, B / 2]
        codes[..., :half] = (blocks & 15).view(torch.int8) - 8
        codes[..., half:] = (blocks >> 4).view(torch.int8) - 8

    def check_kernel(self) -> None:
        """Raises CheckpointUnsupported when torch's kernel has its codes laid otherwise here."""
        codes = torch.arange(INT4_OUTPUTS * 4).remainder(15).view(INT4_OUTPUTS, 4)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        found = torch.empty(INT4_OUTPUTS // self.block_rows, 4, self.block_rows)
        self._unpack(packed, found)
        if not found.transpose(1, 2).reshape_as(codes).add(8).equal(codes.float()):
            raise errors.CheckpointUnsupported(
                f"the store's int4 codes lie in blocks of {self.block_rows} rows, this CPU "
                f"({torch.backends.cpu.get_cpu_capability()}) multiplies others: pack the "
                "checkpoint on this machine, or with --format int8"
            )


_INT4_ROWS = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
KERNELS: dict[torch.dtype, LowBit] = {torch.int8: Int8(), torch.uint8: Int4(_INT4_ROWS)}


def project(tensors: Mapping[str, Tensor], name: str, inputs: Tensor, num_outputs: int) -> Tensor:
    """inputs [t, K] with low-bit matrix `name`. Returns [t, num_outputs]."""
    kernel = KERNELS[tensors[name].dtype]
    padding = tensors[name].shape[1] * kernel.codes_per_byte - inputs.shape[1]
    if padding:
        inputs = functional.pad(inputs, (0, padding))
    if inputs.shape[0] <= kernel.few_tokens:
        output = kernel.multiply(tensors, name, inputs)
    else:
        output = inputs @ kernel.dequantise(tensors, name)
    return output[:, :num_outputs]


def dequantise(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Low-bit matrix `name` as the numbers it means. shape: [N, K] without padding."""
    matrix = KERNELS[tensors[name].dtype].dequantise(tensors, name)
    return matrix.T[: shape[0], : shape[1]].clone()


def check_format(spec: ModelSpec, modules: Mapping[int, Any]) -> None:
    """Whether the store's low-bit records can be multiplied with here.

    modules: model layer number -> experts module

    Raises CheckpointUnsupported for codes laid for another CPU, ManifestInvalid for records that
    have not the shapes that modules and format ask for.
    """
    if spec.weight_format.name not in ("int8", "int4"):
        return
    matrices.check_records(spec, modules, partial(_expected, spec.weight_format))
    if spec.weight_format.name == "int4":
        Int4(BLOCK_ROWS[spec.weight_format.layout]).check_kernel()


def _expected(
    weight_format: WeightFormat, module: Any, stored: Mapping[str, TensorLayout]
) -> Iterator[matrices.Described]:
    for name in matrices.names_of(module):
        dtype = next(n for n, d in TORCH_DTYPES.items() if d == getattr(module, name).dtype)
        shape = matrices.shape_of(module, name)
        for suffix, held_dtype, held_shape in low_bit_tensors(weight_format, *shape, dtype):
            yield name + suffix, held_dtype, held_shape
