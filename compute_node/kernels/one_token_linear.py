"""The dense part's linear layers: one token goes through the native kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compute_node.kernels import gemv


class OneTokenLinear(nn.Linear):
    """nn.Linear, and its bits."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.numel() != self.in_features:
            return functional.linear(inputs, self.weight, self.bias)
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        return gemv.multiply_one(weight, inputs.contiguous(), bias)


def adopt(model: Any) -> None:
    """Every linear layer of a shape that the kernel multiplies with torch's bits becomes such a
    one.
    """
    for module in model.modules():
        if type(module) is nn.Linear and gemv.is_exact(module.weight, module.bias):
            module.__class__ = OneTokenLinear
