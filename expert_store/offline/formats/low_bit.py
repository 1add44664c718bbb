"""What int8 and int4 share: codes, and the scales that give weights back. Imports torch."""

from __future__ import annotations

import torch
from torch import Tensor

from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.formats.matrix import MatrixEncoder
from proto.expert import TensorLayout
from proto.weight_format import low_bit_tensors


class LowBitEncoder(MatrixEncoder):
    """Codes and what gives them back: see proto/weight_format.py."""

    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        described = low_bit_tensors(
            self.weight_format, *parameter.outputs_and_inputs, parameter.dtype
        )
        return tuple(
            TensorLayout(parameter.name + suffix, dtype, shape)
            for suffix, dtype, shape in described
        )


def rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is once stored, and never zero."""
    stored = scale.to(dtype)
    return stored.where(stored > 0, torch.finfo(dtype).tiny).float()
