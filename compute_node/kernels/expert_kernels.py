"""What computes a layer's routed experts: one class a weight format, chosen when the layer's layout
is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compute_node.kernels.formats.as_is import AsIsMatrix
from compute_node.kernels.formats.int4 import Int4Matrix
from compute_node.kernels.formats.int8 import Int8Matrix
from compute_node.kernels.formats.lossless import LosslessMatrix
from compute_node.kernels.formats.matrix import MatrixFormat, MatrixSpec
from compute_node.kernels.gate import Gates
from compute_node.kernels.native_experts import NativeExperts
from compute_node.kernels.prober import Prober
from compute_node.kernels.prompt import Prompt
from compute_node.kernels.torch_experts import Tensors, TorchExperts
from compute_node.store.memory import TORCH_DTYPES
from proto import errors
from proto.expert import TensorLayout, Variant
from proto.weight_format import WeightFormat

MATRICES: dict[str, MatrixFormat] = {
    "exact": AsIsMatrix,
    "bf16": AsIsMatrix,
    "lossless": LosslessMatrix,
    "int8": Int8Matrix,
    "int4": Int4Matrix,
}
"""By the names of proto/weight_format.py."""


class ExpertKernels(Protocol):
    """One layer's experts in one weight format, computed with eager's bits where the format keeps
    the checkpoint's numbers. No method blocks on another thread or raises.
    """

    def feed_forward(self, tensors: Tensors, hidden: Tensor) -> Tensor:
        """What one expert makes of its tokens, gate weights not applied.

        hidden: [t, D]

        Returns [t, D].
        """
        ...

    def one_token(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> Tensor:
        """What each expert makes of one token, times its gate weight. The first call for a number
        of threads compares native entries with torch, which takes some ms.

        hidden: [1, D]; gates: a weight an expert

        Returns [E, D].
        """
        ...

    def add_up(self, rows: Tensor) -> Tensor:
        """The rows of `one_token` added up from zero, in their order, rounded each time. Returns
        [1, D].
        """
        ...

    def many_tokens(self, prompt: Prompt, experts: Mapping[int, Tensors]) -> None:
        """Write to the prompt's outputs what these experts, by number, make of their tokens. The
        first of a number of tokens may compare native entries with torch.
        """
        ...


def bind(
    module: Any,
    weight_format: WeightFormat,
    layout: Sequence[TensorLayout],
    gates: Gates,
    prober: Prober,
) -> ExpertKernels:
    """What computes with records of this layout.

    module: transformers' experts module: has_gate, is_transposed, act_fn, _apply_gate
    """
    kind, stored = MATRICES[weight_format.name], {tensor.name: tensor for tensor in layout}
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    specs = [spec_of(module, name, stored) for name in names]
    up, down = (kind(spec, prober) for spec in specs)
    if up.native is None or down.native is None:
        return TorchExperts(module, up, down)
    hidden, inner = specs[1].shape
    is_plain = module.has_gate and not any(spec.has_bias for spec in specs)
    table = gates.table_of(module, inner) if is_plain else None
    native = up.native, down.native
    return NativeExperts(module, (up, down), native, (hidden, inner), table, prober)


def spec_of(module: Any, name: str, stored: Mapping[str, TensorLayout]) -> MatrixSpec:
    """Of an experts module's parameter. stored: what records hold, by name."""
    parameter = getattr(module, name)
    first, second = parameter.shape[1:]
    return MatrixSpec(
        name=name,
        shape=(second, first) if module.is_transposed else (first, second),
        is_transposed=module.is_transposed,
        has_bias=f"{name}_bias" in stored,
        stored=TORCH_DTYPES[stored[name].dtype] if name in stored else torch.bfloat16,
        model=parameter.dtype,
    )


def check(variant: Variant, modules: Mapping[int, Any]) -> None:
    """That records have what their format's class takes.

    modules: model layer number -> experts module

    Raises CheckpointUnsupported for records that only another CPU can multiply with,
    ManifestInvalid naming what is missing.
    """
    kind = MATRICES[variant.weight_format.name]
    for layer, module in modules.items():
        stored = {tensor.name: tensor for tensor in variant.layouts[layer]}
        held = {(tensor.name, tensor.dtype, tensor.shape) for tensor in stored.values()}
        expected = {
            described
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3  # a bias has two
            for described in kind.expected(
                variant.weight_format, spec_of(module, name, stored), stored
            )
        }
        missing = sorted({name for name, *_ in expected - held})
        if missing:
            raise errors.ManifestInvalid(
                f"layer {layer}: {missing} are not as {variant.weight_format} has them: pack the "
                "checkpoint again"
            )
