"""Kernels of matrices and experts that lie in memory, as the node binds them to records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels.expert_kernels import MATRICES, ExpertKernels, bind
from compute_node.kernels.formats.int4 import Int4Matrix
from compute_node.kernels.formats.int8 import Int8Matrix
from compute_node.kernels.formats.low_bit import LowBitMatrix
from compute_node.kernels.formats.matrix import MatrixSpec
from compute_node.kernels.gate import Gates
from compute_node.kernels.prober import Prober
from compute_node.store.memory import TORCH_DTYPES
from proto.expert import TensorLayout
from proto.weight_format import WeightFormat

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def matrix(
    kind: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    prober: Prober | None = None,
    **changes: Any,
) -> Any:
    """The class of a weight format, for a matrix named `w` of a bf16 model."""
    has_bias, stored = "w_bias" in tensors, tensors["w"].dtype
    spec = MatrixSpec("w", shape, False, has_bias, stored, torch.bfloat16)
    return MATRICES[kind](replace(spec, **changes), prober or Prober())


def bound(
    module: Any,
    tensors: Mapping[str, Tensor],
    prober: Prober | None = None,
    gates: Gates | None = None,
    kind: str = "exact",
) -> ExpertKernels:
    """Of an experts module, for records that hold `tensors`."""
    prober = prober or Prober()
    layout = [TensorLayout(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    return bind(module, WeightFormat(kind), layout, gates or Gates(prober, ""), prober)


def dequantised(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """A low-bit matrix [N, K] as the numbers it means, without padding."""
    is_int8 = tensors[name].dtype == torch.int8
    kind: type[LowBitMatrix] = Int8Matrix if is_int8 else Int4Matrix
    spec = MatrixSpec(name, shape, False, False, tensors[name].dtype, torch.bfloat16)
    return kind(spec, Prober()).dequantise(tensors).T[: shape[0], : shape[1]].clone()
