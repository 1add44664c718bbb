"""Matrices in eight bits a number: a code each, and a scale a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compute_node.kernels import scratch
from compute_node.kernels.formats.low_bit import LowBitMatrix
from proto.weight_format import SCALE


class Int8Matrix(LowBitMatrix):
    """By torch's int8 kernel."""

    few_tokens = 31
    codes_per_byte = 1

    def multiply(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        name = self._spec.name
        return torch._weight_int8pack_mm(inputs, tensors[name], tensors[name + SCALE])

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        name = self._spec.name
        codes, scale = tensors[name], tensors[name + SCALE]  # [N, K], [N]
        return scratch.empty(codes.shape, scale.dtype).copy_(codes).mul_(scale[:, None]).T
