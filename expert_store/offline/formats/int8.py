"""Eight bits a weight, and a scale for each output. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from expert_store.offline.checkpoint.parameters import EXPERT_DTYPES, ExpertParameter
from expert_store.offline.formats.low_bit import LowBitEncoder, rounded
from proto.weight_format import INT8_INPUTS, WeightFormat


class Int8Encoder(LowBitEncoder):
    """A scale for each output."""

    weight_format = WeightFormat("int8", lossy=True)
    contents = "Each matrix of an expert is kept as 8-bit codes with one scale for each output."

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        return quantise(matrix, EXPERT_DTYPES[parameter.dtype])


def quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale a row.

    weight: [N, K]

    Returns codes [N, K padded to 16s] int8 and scales [N] of `dtype`.
    """
    num_inputs = weight.shape[1]
    padded = functional.pad(weight.float(), (0, -num_inputs % INT8_INPUTS))
    scale = rounded(padded.abs().amax(dim=1) / 127, dtype)
    codes = (padded / scale[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale.to(dtype)
