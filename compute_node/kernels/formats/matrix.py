"""One matrix of each expert of a layer: what is known of it before any record comes, and what each
weight format's class does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from compute_node.kernels import gemm
from compute_node.kernels.prober import Prober
from compute_node.kernels.verdicts import Verdict
from proto.expert import TensorLayout
from proto.weight_format import WeightFormat

# Name, dtype and shape of a tensor in a record.
Described = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class MatrixSpec:
    """shape:         outputs and inputs, [N, K], without padding
    is_transposed: the checkpoint, and a record in its dtype, have it as [K, N]
    has_bias:      records hold `<name>_bias` [N]
    stored, model: dtype of what a record holds as `name`, and of the model
    """

    name: str
    shape: tuple[int, int]
    is_transposed: bool
    has_bias: bool
    stored: torch.dtype
    model: torch.dtype

    def bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors[f"{self.name}_bias"] if self.has_bias else None

    def biases(self, experts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Of each; none where there are none."""
        return [tensors[f"{self.name}_bias"] for tensors in experts] if self.has_bias else []


class NativeMatrix(Protocol):
    """A matrix for native entries. Each method computes with as many threads as torch has now, and
    none blocks or raises.
    """

    is_lossless: bool

    def arrays(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What an entry takes of one expert's matrix, in its order."""
        ...

    def of_one_token(self, tensors: Mapping[str, Tensor]) -> Verdict:
        """On `multiply`. The first of a number of threads tries it out with these tensors."""
        ...

    def multiply(self, experts: Sequence[Mapping[str, Tensor]], inputs: Tensor) -> Tensor:
        """Several experts' at once, bias added; `of_one_token` must have a way.

        inputs: [E, K], a row for each expert, or [1, K], one for all

        Returns [E, N].
        """
        ...

    def step_of(self, tensors: Mapping[str, Tensor], num_tokens: int) -> int:
        """After how many columns native gemm has to start a new accumulator to give torch's bits.
        0: torch has to multiply. The first of a number of tokens and threads tries it out with
        these tensors.
        """
        ...


class Steps:
    """Of one matrix's products of several tokens: what `NativeMatrix.step_of` returns, asked of the
    prober once for a number of tokens and threads, or once more when the node was idle.
    """

    def __init__(self, spec: MatrixSpec, prober: Prober) -> None:
        self._spec, self._prober = spec, prober
        self._known: dict[tuple[int, int], int] = {}  # by tokens and threads

    def of(self, tensors: Mapping[str, Tensor], num_tokens: int, ask: Callable[[], Verdict]) -> int:
        """ask: for the verdict, where it need not wait until the node is idle"""
        key = (num_tokens, torch.get_num_threads())
        if key not in self._known:
            bias, ask_again = self._spec.bias(tensors), partial(self._known.pop, key, None)
            is_put_off = gemm.is_put_off(
                self._prober, num_tokens, self._spec.shape, bias, ask_again
            )
            self._known[key] = 0 if is_put_off else ask().chosen
        return self._known[key]


class Matrix(Protocol):
    """A matrix as one weight format keeps it. Made once, when a layer's layout is known."""

    @property
    def native(self) -> NativeMatrix | None:
        """None where torch alone can compute."""
        ...

    def linear(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """One expert's product, bias added, with eager's bits where the format has its numbers.

        inputs: [t, K]

        Returns [t, N]. Overwrites this thread's scratch; raises nothing.
        """
        ...


class MatrixFormat(Protocol):
    """The class of a weight format."""

    def __call__(self, spec: MatrixSpec, prober: Prober) -> Matrix: ...

    def expected(
        self, weight_format: WeightFormat, matrix: MatrixSpec, stored: Mapping[str, TensorLayout]
    ) -> Iterator[Described]:
        """What a layer's records must hold of a matrix. stored: what they hold, by name.

        Raises CheckpointUnsupported for records that only another CPU can multiply with.
        """
        ...
