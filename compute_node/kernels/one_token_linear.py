"""The dense part's linear layers: one token goes through the native kernel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from compute_node.kernels import gemv
from compute_node.kernels.prober import Prober


class OneTokenLinear:
    """What an nn.Linear does, and its bits."""

    def __init__(self, linear: nn.Linear) -> None:
        self._weight, self._bias = linear.weight, linear.bias
        self._num_inputs = linear.in_features

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.numel() != self._num_inputs:
            return functional.linear(inputs, self._weight, self._bias)
        return gemv.multiply_one(self._weight, inputs.contiguous(), self._bias)


def adopt(model: nn.Module, prober: Prober) -> None:
    """Every linear layer of a shape that the kernel multiplies with torch's bits gets such a
    forward.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _is_native(module, prober):
            setattr(module, "forward", OneTokenLinear(module))  # noqa: B010  a method, to mypy


def _is_native(linear: nn.Linear, prober: Prober) -> bool:
    return gemv.verdict_of(prober, linear.weight, linear.bias).chosen > 0
