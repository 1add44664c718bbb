"""The dense part's linear layers: one token goes through the native kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compute_node import gemv


class OneTokenLinear(nn.Linear):
    """nn.Linear, and its bits."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.numel() != self.in_features:
            return functional.linear(inputs, self.weight, self.bias)
        biases = [] if self.bias is None else [self.bias]
        output = gemv.multiply([self.weight], inputs.reshape(1, -1), biases)
        return output.view(*inputs.shape[:-1], -1)


def adopt(model: Any) -> None:
    """Every linear layer of a shape that the kernel multiplies with torch's bits becomes such a
    one.
    """
    for module in model.modules():
        if type(module) is nn.Linear and gemv.is_exact(module.weight, module.bias):
            module.__class__ = OneTokenLinear
