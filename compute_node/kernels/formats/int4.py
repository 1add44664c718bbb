"""Matrices in four bits a number: codes, and a scale and a zero a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from compute_node.kernels import scratch
from compute_node.kernels.formats.low_bit import LowBitMatrix
from compute_node.kernels.formats.matrix import Described, MatrixSpec
from proto import errors
from proto.expert import TensorLayout
from proto.weight_format import BLOCK_ROWS, INT4_OUTPUTS, SCALE_ZERO, WeightFormat

# As torch's kernel has it on this CPU.
_BLOCK_ROWS = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


class Int4Matrix(LowBitMatrix):
    """By torch's int4 kernel."""

    few_tokens = 96
    codes_per_byte = 2

    def multiply(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        codes, scale_zero = tensors[self._spec.name], tensors[self._spec.name + SCALE_ZERO]
        group = codes.shape[1] * 2 // scale_zero.shape[0]
        return torch._weight_int4pack_mm_for_cpu(inputs, codes, group, scale_zero)

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        name = self._spec.name
        codes, scale_zero = tensors[name], tensors[name + SCALE_ZERO]  # [N, K / 2], [K / G, N, 2]
        num_outputs, num_inputs = codes.shape[0], codes.shape[1] * 2
        scale, zero = scale_zero.unbind(-1)  # [K / G, N]
        shape = (num_inputs, num_outputs // _BLOCK_ROWS, _BLOCK_ROWS)
        weight = scratch.empty(shape, scale_zero.dtype)
        _unpack(codes, weight.transpose(0, 1))
        grouped = weight.view(scale.shape[0], -1, num_outputs)  # [K / G, G, N]
        # One rounding, as in the low-bit kernel; contiguous factors are five times faster.
        factors = zero.contiguous()[:, None], scale.contiguous()[:, None]
        torch.addcmul(factors[0], grouped, factors[1], out=grouped)
        return grouped.view(num_inputs, num_outputs)

    @classmethod
    def expected(
        cls, weight_format: WeightFormat, matrix: MatrixSpec, stored: Mapping[str, TensorLayout]
    ) -> Iterator[Described]:
        """Raises CheckpointUnsupported when torch's kernel has its codes laid otherwise here."""
        yield from super().expected(weight_format, matrix, stored)
        _check_kernel(BLOCK_ROWS[weight_format.layout])


def _unpack(packed: Tensor, codes: Tensor) -> None:
    """packed: [N, K / 2]; codes: [N / B, K, B], to be filled with numbers from -8 to 7."""
    half = codes.shape[2] // 2
    blocks = packed.view(-1, codes.shape[1], half)  # [N / B, K, B / 2]
    codes[..., :half] = (blocks & 15).view(torch.int8) - 8
    codes[..., half:] = (blocks >> 4).view(torch.int8) - 8


def _check_kernel(block_rows: int) -> None:
    codes = torch.arange(INT4_OUTPUTS * 4).remainder(15).view(INT4_OUTPUTS, 4)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    found = torch.empty(INT4_OUTPUTS // block_rows, 4, block_rows)
    _unpack(packed, found)
    if not found.transpose(1, 2).reshape_as(codes).add(8).equal(codes.float()):
        raise errors.CheckpointUnsupported(
            f"the store's int4 codes lie in blocks of {block_rows} rows, this CPU "
            f"({torch.backends.cpu.get_cpu_capability()}) multiplies others: pack the "
            "checkpoint on this machine, or with --format int8"
        )
