"""What formats that keep matrices in another way share. Imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.formats.exact import ExactEncoder
from expert_store.offline.formats.weight_source import WeightSource
from proto.expert import TensorLayout


class MatrixEncoder(ExactEncoder, ABC):
    """Matrices in another way, biases as they are; holds one matrix at a time."""

    def layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        return self._layout(parameter) if parameter.is_matrix else super().layout(parameter)

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        if not parameter.is_matrix:
            yield from super().encode(parameter, expert, source)
            return
        for tensor in self._tensors(parameter, source.matrix(parameter, expert)):
            yield [tensor.contiguous().view(torch.uint8).numpy().tobytes()]

    @abstractmethod
    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]: ...

    @abstractmethod
    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        """matrix: [N, K]"""
