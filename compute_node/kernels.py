"""One expert's feed-forward on borrowed weights, in the order of operations of transformers'
eager experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def feed_forward(module: Any, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """What one expert makes of its tokens, gate weights not applied.

    module:  the experts module: has_gate, has_bias, is_transposed, act_fn, _apply_gate
    tensors: gate_up_proj (or up_proj), down_proj, and biases under the module's names
    hidden:  [t, D]

    Returns [t, D].
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _project(module, tensors, up_name, hidden)  # [t, 2F] or [t, F]
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # [t, F]
    return _project(module, tensors, "down_proj", inner)


def _project(module: Any, tensors: dict[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    weight = tensors[name]
    if module.is_transposed:
        output = inputs @ weight
        return output + tensors[f"{name}_bias"] if module.has_bias else output
    return functional.linear(inputs, weight, tensors.get(f"{name}_bias"))


def combine(outputs: Tensor, topk_ids: Tensor) -> Tensor:
    """Sum each token's weighted expert outputs in ascending expert order, one rounding an addition.

    This is what eager's index_add_ over ascending experts does, whatever order the experts were
    computed in.

    outputs:  [T, K, D], place k belongs to topk_ids[:, k]
    topk_ids: [T, K]

    Returns [T, D].
    """
    order = topk_ids.argsort(dim=1)  # [T, K]
    rows = torch.arange(outputs.shape[0])
    total = torch.zeros_like(outputs[:, 0])
    for k in range(outputs.shape[1]):
        total += outputs[rows, order[:, k]]
    return total
