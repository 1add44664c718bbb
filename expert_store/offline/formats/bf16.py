"""Matrices in bfloat16, in the module's own shape. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.formats.matrix import MatrixEncoder
from proto.expert import TensorLayout
from proto.weight_format import WeightFormat


class Bf16Encoder(MatrixEncoder):
    """The module's own shape, in bf16."""

    contents = "Each matrix of an expert is kept in bfloat16."

    def __init__(self, architecture: Architecture) -> None:
        same = all(p.encoding == "mxfp4" or p.dtype == "BF16" for p in architecture.matrices)
        self.weight_format = WeightFormat("bf16", lossy=not same)

    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        return (TensorLayout(parameter.name, "BF16", parameter.shape),)

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        yield (matrix.T if parameter.is_transposed else matrix).to(torch.bfloat16)
