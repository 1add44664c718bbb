"""A layer's bf16 experts by native entries, where those give the bits of torch's own operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels import gemv, prompt_entry
from compute_node.kernels.formats.matrix import Matrix, NativeMatrix
from compute_node.kernels.prober import Prober
from compute_node.kernels.prompt import Prompt
from compute_node.kernels.torch_experts import Tensors, TorchExperts, weighted
from compute_node.kernels.verdicts import Verdict, same_bits
from compute_node.native import binding

# From this many on, torch shares the elements of a tensor out to threads at any place, and an
# activation's bits may depend on where.
_SHARED_OUT_ELEMENTS = 32768
_LANES = 16  # of the entry that adds rows up

OneToken = Callable[[Sequence[Tensors], Tensor, Sequence[float]], Tensor]


class NativeExperts(TorchExperts):
    """ExpertKernels of matrices that native entries take.

    up, down: for native entries as well
    shape:    hidden and inner size, [D, F]
    table:    of `gate.Gates`; None: torch activates
    """

    def __init__(
        self,
        module: Any,
        matrices: tuple[Matrix, Matrix],
        native: tuple[NativeMatrix, NativeMatrix],
        shape: tuple[int, int],
        table: Tensor | None,
        prober: Prober,
    ) -> None:
        super().__init__(module, *matrices)
        self._native_up, self._native_down = native
        self._hidden, self._inner = shape
        self._table, self._prober = table, prober
        self._is_lossless = self._native_down.is_lossless
        self._ways: dict[int, OneToken] = {}  # by threads

    def one_token(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> Tensor:
        if hidden.dtype != torch.bfloat16:
            return super().one_token(experts, hidden, gates)
        threads = torch.get_num_threads()
        if threads not in self._ways:
            self._ways[threads] = self._choose(experts, hidden, gates)
        return self._ways[threads](experts, hidden, gates)

    def add_up(self, rows: Tensor) -> Tensor:
        if rows.dtype != torch.bfloat16 or self._hidden % _LANES:
            return super().add_up(rows)
        total = torch.empty((1, self._hidden), dtype=torch.bfloat16)
        binding.kernels().add_rows(
            rows.data_ptr(), None, rows.shape[0], self._hidden, total.data_ptr()
        )
        return total

    def many_tokens(self, prompt: Prompt, experts: Mapping[int, Tensors]) -> None:
        if self._table is None or prompt.hidden.dtype != torch.bfloat16:
            super().many_tokens(prompt, experts)
            return
        shares, others = [], {}
        for expert, tensors in experts.items():
            places = prompt.places(expert)
            steps = self._steps_of(tensors, len(places))
            if all(steps):
                arrays = self._native_up.arrays(tensors), self._native_down.arrays(tensors)
                shares.append(prompt_entry.Share(*arrays, places, *steps))
            else:
                others[expert] = tensors
        super().many_tokens(prompt, others)
        if shares:
            prompt_entry.compute(prompt, shares, self._table, self._inner, self._is_lossless)

    def _steps_of(self, tensors: Tensors, num_tokens: int) -> tuple[int, int]:
        """Of both products; 0 where torch has to multiply."""
        up, down = self._native_up, self._native_down
        return up.step_of(tensors, num_tokens), down.step_of(tensors, num_tokens)

    def _choose(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> OneToken:
        """How one token is computed with as many threads as torch has now."""
        matrices = self._native_up, self._native_down
        verdicts = [matrix.of_one_token(experts[0]) for matrix in matrices]
        if all(verdict.way for verdict in verdicts):
            if self._table is not None and self._of_all_in_one(experts, hidden, gates).chosen:
                return self._all_in_one
            if all(verdict.chosen for verdict in verdicts):
                return self._each_product
        return super().one_token

    def _of_all_in_one(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> Verdict:
        key = (self._is_lossless, self._hidden, self._inner, torch.get_num_threads())

        def prove() -> Verdict:
            by_torch = super(NativeExperts, self).one_token
            expected, found = (way(experts, hidden, gates) for way in (by_torch, self._all_in_one))
            if not same_bits(expected, found):
                return Verdict(0)
            ratio = self._prober.ratio(
                lambda: self._all_in_one(experts, hidden, gates),
                lambda: by_torch(experts, hidden, gates),
            )
            return Verdict(1, ratio)

        return self._prober.experts.ask(key, prove)

    def _all_in_one(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> Tensor:
        """In one call of native one_token."""
        assert self._table is not None
        count = len(experts)
        up, down = self._native_up.arrays, self._native_down.arrays
        outputs = torch.empty((count, self._hidden), dtype=torch.bfloat16)
        scratch = torch.empty(3 * count * self._inner, dtype=torch.bfloat16)
        binding.kernels().experts(
            gemv.addresses([array for tensors in experts for array in up(tensors)]),
            gemv.addresses([array for tensors in experts for array in down(tensors)]),
            self._is_lossless,
            count,
            hidden.data_ptr(),
            self._table.data_ptr(),
            (ctypes.c_float * count)(*gates),
            scratch.data_ptr(),
            outputs.data_ptr(),
            self._hidden,
            self._inner,
            gemv.parallel(),
            torch.get_num_threads(),
        )
        return outputs

    def _each_product(
        self, experts: Sequence[Tensors], hidden: Tensor, gates: Sequence[float]
    ) -> Tensor:
        """Both products of all experts in one call each."""
        inner = self._native_up.multiply(experts, hidden)  # [E, 2F] or [E, F]
        if inner.numel() < _SHARED_OUT_ELEMENTS:
            inner = self._activate(inner)  # [E, F]
        else:
            inner = torch.cat([self._activate(row) for row in inner[:, None].unbind()])
        outputs = self._native_down.multiply(experts, inner)
        return weighted(outputs[:, None].unbind(), gates)
