"""One expert's feed-forward on borrowed weights, in the order of operations of transformers'
eager experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels import gemm, gemv, lossless, low_bit, matrices

# From this many on, torch shares the elements of a tensor out to threads at any place, and an
# activation's bits may depend on where.
_SHARED_OUT_ELEMENTS = 32768


def feed_forward(module: Any, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """What one expert makes of its tokens, gate weights not applied.

    module:  the experts module: has_gate, has_bias, is_transposed, act_fn, _apply_gate
    tensors: gate_up_proj (or up_proj), down_proj, and biases under the module's names
    hidden:  [t, D]

    Returns [t, D].
    """
    inner = _project(module, tensors, _up_name(module), hidden)  # [t, 2F] or [t, F]
    return _project(module, tensors, "down_proj", _activate(module, inner))


def feed_forward_each(module: Any, experts: Sequence[dict[str, Tensor]], hidden: Tensor) -> Tensor:
    """`feed_forward` of one token through several experts.

    hidden: [1, D]

    Returns [E, D].
    """
    up_name = _up_name(module)
    if not all(_is_native(module, experts[0], name, hidden) for name in (up_name, "down_proj")):
        return torch.cat([feed_forward(module, tensors, hidden) for tensors in experts])
    inner = _multiply(module, experts, up_name, hidden)  # [E, 2F] or [E, F]
    if inner.numel() < _SHARED_OUT_ELEMENTS:
        inner = _activate(module, inner)  # [E, F]
    else:
        inner = torch.cat([_activate(module, row) for row in inner[:, None].unbind()])
    return _multiply(module, experts, "down_proj", inner)


def _up_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activate(module: Any, inner: Tensor) -> Tensor:
    """[t, 2F] or [t, F] to [t, F]."""
    activated: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return activated


def _is_native(module: Any, tensors: dict[str, Tensor], name: str, hidden: Tensor) -> bool:
    if module.is_transposed:
        return False
    if lossless.is_packed(tensors, name):
        return lossless.is_exact(tensors, name, matrices.shape_of(module, name))
    same_dtype = tensors[name].dtype == hidden.dtype  # not where packed as bf16 of another
    return same_dtype and gemv.is_exact(tensors[name], tensors.get(f"{name}_bias"))


def _multiply(
    module: Any, experts: Sequence[dict[str, Tensor]], name: str, inputs: Tensor
) -> Tensor:
    if lossless.is_packed(experts[0], name):
        return lossless.multiply(experts, name, inputs, matrices.shape_of(module, name)[0])
    bias = f"{name}_bias"
    biases = [tensors[bias] for tensors in experts if bias in tensors]
    return gemv.multiply([tensors[name] for tensors in experts], inputs, biases)


def _project(module: Any, tensors: dict[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    if lossless.is_packed(tensors, name):
        shape = matrices.shape_of(module, name)
        if not module.is_transposed:
            return lossless.linear(inputs, tensors, name, shape)
        weight = lossless.unpack(tensors, name, shape).T.contiguous()
    elif tensors[name].dtype in low_bit.KERNELS:
        return _project_low_bit(module, tensors, name, inputs)
    else:
        weight = tensors[name].to(inputs.dtype)  # the same, unless packed as bf16 of another dtype
    if module.is_transposed:
        output = inputs @ weight
        return output + tensors[f"{name}_bias"] if module.has_bias else output
    return gemm.linear(inputs, weight, tensors.get(f"{name}_bias"))


def _project_low_bit(module: Any, tensors: dict[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    num_outputs, _ = matrices.shape_of(module, name)
    output = low_bit.project(tensors, name, inputs, num_outputs)
    return output + tensors[f"{name}_bias"] if module.has_bias else output


def add_in_order(outputs: Tensor, order: Tensor) -> Tensor:
    """The sum of each token's rows, one rounding an addition. outputs: [T, K, D]; order: [T, K],
    which row comes when. Returns [T, D].
    """
    rows = torch.arange(outputs.shape[0])
    total = torch.zeros_like(outputs[:, 0])
    for k in range(outputs.shape[1]):
        total += outputs[rows, order[:, k]]
    return total
