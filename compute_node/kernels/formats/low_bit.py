"""Products with low-bit weights: by a low-bit kernel for few tokens, dequantised for many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from compute_node.kernels.formats.matrix import Described, MatrixSpec
from compute_node.kernels.prober import Prober
from compute_node.store.memory import TORCH_DTYPES
from proto.expert import TensorLayout
from proto.weight_format import WeightFormat, low_bit_tensors


class LowBitMatrix(ABC):
    """A Matrix [N, K] of codes, whatever way round the checkpoint has it; padded.

    few_tokens: up to this many, the low-bit kernel is faster than dequantising (tests/bench/LOG.md)
    """

    few_tokens: ClassVar[int]
    codes_per_byte: ClassVar[int]
    native = None

    def __init__(self, spec: MatrixSpec, prober: Prober) -> None:
        self._spec = spec

    def linear(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        padding = tensors[self._spec.name].shape[1] * self.codes_per_byte - inputs.shape[1]
        if padding:
            inputs = functional.pad(inputs, (0, padding))
        if inputs.shape[0] <= self.few_tokens:
            output = self.multiply(tensors, inputs)
        else:
            output = inputs @ self.dequantise(tensors)
        output, bias = output[:, : self._spec.shape[0]], self._spec.bias(tensors)
        return output if bias is None else output + bias

    @abstractmethod
    def multiply(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """inputs [t, K] with the matrix, [t, N]; padding included in both."""

    @abstractmethod
    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As [K, N] in the dtype of its scales, padding included; valid until the next on this
        thread.
        """

    @classmethod
    def expected(
        cls, weight_format: WeightFormat, matrix: MatrixSpec, stored: Mapping[str, TensorLayout]
    ) -> Iterator[Described]:
        dtype = next(name for name, dtype in TORCH_DTYPES.items() if dtype == matrix.model)
        for suffix, held_dtype, shape in low_bit_tensors(weight_format, *matrix.shape, dtype):
            yield matrix.name + suffix, held_dtype, shape
