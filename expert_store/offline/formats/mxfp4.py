"""mxfp4 weights, as gpt-oss ships them, as the numbers that they mean."""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1; bit 3 is the sign
_EXPONENT_BIAS = 127


def dequantise(blocks: Tensor, scales: Tensor, num_inputs: int) -> Tensor:
    """What blocks and scales mean, exactly.

    blocks: [N * K / 2] uint8, two values a byte, the lower four bits first
    scales: [N * K / 32] uint8, the exponent of each 32 values
    num_inputs: K

    Returns [N, K] bfloat16.
    """
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(-1, 32).int()
    exponents = scales.int() - _EXPONENT_BIAS
    weights = torch.ldexp(values[codes], exponents[:, None])
    return weights.to(torch.bfloat16).view(-1, num_inputs)
