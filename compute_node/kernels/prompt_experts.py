"""Many tokens through the experts of a layer: all that are there at once in one call of
native/prompt.h where every step of it is known to give torch's bits, else one by one by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels import gemm, gemv, lossless, matrices, one_token_experts
from compute_node.kernels.feed_forward import add_in_order, feed_forward
from compute_node.native import binding

_MATRICES = ("gate_up_proj", "down_proj")
_LANES = 16  # of native one_token, which adds rows up


class _Expert(ctypes.Structure):
    """As native/prompt.h has it."""

    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("up_step", ctypes.c_int64),
        ("down_step", ctypes.c_int64),
    )


class _Prompt(ctypes.Structure):
    """As native/prompt.h has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("states", "weights", "table", "outputs", "scratch")),
        *(
            (name, ctypes.c_int64)
            for name in ("scratch_numbers", "tokens", "top_k", "hidden", "inner", "lossless")
        ),
    )


@dataclass(frozen=True)
class _Share:
    """An expert, and the tokens that chose it.

    tensors: of its record; places: [t] int64, k * T + token of each choice
    steps: how native/prompt.h goes through both products; 0 where torch has to multiply
    """

    tensors: dict[str, Tensor]
    places: Tensor
    steps: tuple[int, int]


class Prompt:
    """One layer's step of a prompt.

    hidden: [T, D], contiguous; topk_ids: [T, K]; topk_weights: [T, K]
    outputs: [T, K, D], what the chosen experts made, weighted; zero until `add`
    """

    def __init__(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_experts: int
    ) -> None:
        self.outputs = hidden.new_zeros(*topk_ids.shape, hidden.shape[-1])
        self._hidden, self._ids, self._weights = hidden, topk_ids, topk_weights
        self._wide_weights = topk_weights.float().contiguous()
        # Eager visits (k, token) in this order; a matmul's rows must not be permuted.
        chosen = topk_ids.T.reshape(-1)
        self._order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=num_experts + 1)
        self._ends = counts.cumsum(0).tolist()

    def add(self, module: Any, experts: Mapping[int, dict[str, Tensor]]) -> None:
        """Compute the tokens that chose them. experts: the tensors of each by its number."""
        if not experts:
            return
        some = next(iter(experts.values()))  # all are alike
        table = one_token_experts.table_of(module, some, self._hidden)
        native = []
        for expert, tensors in experts.items():
            places = self._places(expert)
            steps = (0, 0) if table is None else _steps_of(module, tensors, len(places))
            share = _Share(tensors, places, steps)
            if all(steps):
                native.append(share)
            else:
                self._add_by_torch(module, share)
        if native and table is not None:
            self._add_native(module, native, table)

    def total(self) -> Tensor:
        """[T, D], each token's sum, once all its experts were added."""
        ordered = self._ids.sort(dim=1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            return self._total_by_torch()
        return combine(self.outputs, self._ids)

    def _total_by_torch(self) -> Tensor:
        """As eager adds: what one expert makes of both choices of it is rounded once."""
        total = torch.zeros_like(self._hidden)
        for expert in range(len(self._ends) - 1):
            if len(places := self._places(expert)):
                place, token = places // len(self._hidden), places % len(self._hidden)
                total.index_add_(0, token, self.outputs[token, place])
        return total

    def _places(self, expert: int) -> Tensor:
        return self._order[self._ends[expert - 1] if expert else 0 : self._ends[expert]]

    def _add_by_torch(self, module: Any, share: _Share) -> None:
        place, token = share.places // len(self._hidden), share.places % len(self._hidden)
        output = feed_forward(module, share.tensors, self._hidden[token])  # [t, D]
        weighted = output * self._weights[token, place, None]
        self.outputs[token, place] = weighted.to(self._hidden.dtype)

    def _add_native(self, module: Any, shares: Sequence[_Share], table: Tensor) -> None:
        """The busiest first, so that threads end together."""
        ordered = sorted(shares, key=lambda share: len(share.places), reverse=True)
        hidden, inner = matrices.shape_of(module, "down_proj")
        threads = torch.get_num_threads()
        numbers = len(ordered[0].places) * (2 * hidden + 3 * inner)
        scratch = torch.empty(threads * numbers, dtype=torch.bfloat16)
        arrays = [
            [gemv.addresses(lossless.arrays_of(share.tensors, name)) for name in _MATRICES]
            for share in ordered
        ]
        experts = [
            _Expert(
                *map(ctypes.addressof, pair),
                share.places.data_ptr(),
                len(share.places),
                *share.steps,
            )
            for share, pair in zip(ordered, arrays, strict=True)
        ]
        prompt = _Prompt(
            self._hidden.data_ptr(),
            self._wide_weights.data_ptr(),
            table.data_ptr(),
            self.outputs.data_ptr(),
            scratch.data_ptr(),
            numbers,
            len(self._hidden),
            self._weights.shape[1],
            hidden,
            inner,
            lossless.is_packed(ordered[0].tensors, "down_proj"),
        )
        binding.kernels().prompt_experts(
            ctypes.byref(prompt),
            (_Expert * len(experts))(*experts),
            len(experts),
            gemv.parallel(),
            threads,
        )


def combine(outputs: Tensor, topk_ids: Tensor) -> Tensor:
    """Sum each token's weighted expert outputs in ascending expert order, one rounding an addition.
    No expert stands twice in a row of topk_ids.

    This is what eager's index_add_ over ascending experts does, whatever order the experts were
    computed in.

    outputs:  [T, K, D], place k belongs to topk_ids[:, k]
    topk_ids: [T, K]

    Returns [T, D].
    """
    order = topk_ids.argsort(dim=1).contiguous()  # [T, K]
    native = binding.load() is not None and outputs.dtype == torch.bfloat16
    if not native or not outputs.is_contiguous() or outputs.shape[2] % _LANES:
        return add_in_order(outputs, order)
    totals = torch.empty_like(outputs[:, 0])
    binding.kernels().add_rows_of_each(
        outputs.data_ptr(),
        order.data_ptr(),
        *outputs.shape,
        totals.data_ptr(),
        gemv.parallel(),
        torch.get_num_threads(),
    )
    return totals


def _steps_of(module: Any, tensors: Mapping[str, Tensor], num_tokens: int) -> tuple[int, int]:
    """As `_Share` has them."""
    hidden, inner = matrices.shape_of(module, "down_proj")
    shapes = (2 * inner, hidden), (hidden, inner)
    up, down = (
        _step_of(num_tokens, tensors, name, shape)
        for name, shape in zip(_MATRICES, shapes, strict=True)
    )
    return up, down


def _step_of(
    num_tokens: int, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]
) -> int:
    if lossless.is_packed(tensors, name):
        return lossless.step_of(num_tokens, tensors, name, shape)
    return gemm.step_of(num_tokens, tensors[name])
