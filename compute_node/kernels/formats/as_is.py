"""Matrices in the checkpoint's own dtype, or in bf16 where the model has another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import gemm, gemv
from compute_node.kernels.formats.matrix import Described, MatrixSpec, Steps
from compute_node.kernels.prober import Prober
from compute_node.kernels.verdicts import Verdict
from compute_node.native import binding
from proto.expert import TensorLayout
from proto.weight_format import WeightFormat


class AsIsMatrix:
    """A Matrix [N, K], or [K, N] where the checkpoint has it so."""

    def __init__(self, spec: MatrixSpec, prober: Prober) -> None:
        self._spec = spec
        is_bf16 = spec.stored == spec.model == torch.bfloat16
        is_native = is_bf16 and not spec.is_transposed and binding.load() is not None
        self.native = NativeAsIs(spec, prober) if is_native else None

    @classmethod
    def expected(
        cls, weight_format: WeightFormat, matrix: MatrixSpec, stored: Mapping[str, TensorLayout]
    ) -> Iterator[Described]:
        dtype = stored[matrix.name].dtype if matrix.name in stored else ""
        yield matrix.name, dtype, matrix.shape[::-1] if matrix.is_transposed else matrix.shape

    def linear(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        weight, bias = tensors[self._spec.name], self._spec.bias(tensors)
        if self.native is not None and gemm.can_take(inputs):
            step = self.native.step_of(tensors, inputs.shape[0])
            if step:
                return gemm.multiply(inputs, weight, bias, step)
        weight = weight.to(inputs.dtype)
        if not self._spec.is_transposed:
            return functional.linear(inputs, weight, bias)
        output = inputs @ weight
        return output if bias is None else output + bias


class NativeAsIs:
    """The same for native entries."""

    is_lossless = False

    def __init__(self, spec: MatrixSpec, prober: Prober) -> None:
        self._spec, self._prober = spec, prober
        self._of_one: dict[int, Verdict] = {}  # by threads
        self._steps = Steps(spec, prober)

    def arrays(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[self._spec.name]]

    def of_one_token(self, tensors: Mapping[str, Tensor]) -> Verdict:
        threads = torch.get_num_threads()
        if threads not in self._of_one:
            weight, bias = tensors[self._spec.name], self._spec.bias(tensors)
            self._of_one[threads] = gemv.verdict_of(self._prober, weight, bias)
        return self._of_one[threads]

    def multiply(self, experts: Sequence[Mapping[str, Tensor]], inputs: Tensor) -> Tensor:
        weights = [tensors[self._spec.name] for tensors in experts]
        return gemv.multiply(weights, inputs, self._spec.biases(experts))

    def step_of(self, tensors: Mapping[str, Tensor], num_tokens: int) -> int:
        return self._steps.of(tensors, num_tokens, partial(self._ask, tensors, num_tokens))

    def _ask(self, tensors: Mapping[str, Tensor], num_tokens: int) -> Verdict:
        weight, bias = tensors[self._spec.name], self._spec.bias(tensors)
        return gemm.verdict_of(self._prober, num_tokens, weight, bias)
