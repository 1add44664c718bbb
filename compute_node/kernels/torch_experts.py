"""A layer's experts in the order of operations of transformers' eager ones, each operation on its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels.formats.matrix import Matrix
from compute_node.kernels.prompt import Prompt

Tensors = Mapping[str, Tensor]


class TorchExperts:
    """ExpertKernels for any weight format.

    module: the experts module: has_gate, act_fn, _apply_gate
    """

    def __init__(self, module: Any, up: Matrix, down: Matrix) -> None:
        self._up, self._down = up, down
        self._activate = module._apply_gate if module.has_gate else module.act_fn

    def feed_forward(self, tensors: Tensors, hidden: Tensor) -> Tensor:
        """What one expert makes of its tokens, gate weights not applied. hidden: [t, D]. Returns
        [t, D].
        """
        inner = self._up.linear(tensors, hidden)  # [t, 2F] or [t, F]
        return self._down.linear(tensors, self._activate(inner))

    def one_token(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> Tensor:
        return weighted([self.feed_forward(tensors, hidden) for tensors in experts], gates)

    def add_up(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows[:1])
        for row in rows[:, None].unbind():
            total += row
        return total

    def many_tokens(self, prompt: Prompt, experts: Mapping[int, Tensors]) -> None:
        for expert, tensors in experts.items():
            prompt.put(expert, self.feed_forward(tensors, prompt.inputs_of(expert)))


def weighted(outputs: Sequence[Tensor], gates: Sequence[float]) -> Tensor:
    """outputs: [1, D] each; gates: a weight each. Returns [E, D]."""
    return torch.cat([output * gate for output, gate in zip(outputs, gates, strict=True)])
