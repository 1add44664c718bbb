"""Many tokens through the experts of a layer, one expert after another: in one call of
native/prompt.c where every step of it is known to give torch's bits, else by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compute_node import gemm, gemv, lossless, matrices, native_library, one_token_experts
from compute_node.kernels import feed_forward


class _Sizes(ctypes.Structure):
    """As native/prompt.c has it."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("tokens", "top_k", "hidden", "inner", "up_step", "down_step")
    )


class Prompt:
    """One layer's step of a prompt.

    hidden: [T, D], contiguous; topk_ids: [T, K]; topk_weights: [T, K]
    outputs: [T, K, D], what the chosen experts made, weighted; zero until `add`
    """

    def __init__(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_experts: int
    ) -> None:
        self.outputs = hidden.new_zeros(*topk_ids.shape, hidden.shape[-1])
        self._hidden, self._weights = hidden, topk_weights
        self._wide_weights = topk_weights.float().contiguous()
        # Eager visits (k, token) in this order; a matmul's rows must not be permuted.
        chosen = topk_ids.T.reshape(-1)
        self._order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=num_experts + 1)
        self._ends = counts.cumsum(0).tolist()

    def add(self, module: Any, tensors: dict[str, Tensor], expert: int) -> None:
        """Compute the tokens that chose `expert`."""
        places = self._order[self._ends[expert - 1] if expert else 0 : self._ends[expert]]
        if not self._add_native(module, tensors, places):
            self._add_by_torch(module, tensors, places)

    def _add_by_torch(self, module: Any, tensors: dict[str, Tensor], places: Tensor) -> None:
        place, token = places // len(self._hidden), places % len(self._hidden)
        output = feed_forward(module, tensors, self._hidden[token])  # [t, D]
        weighted = output * self._weights[token, place, None]
        self.outputs[token, place] = weighted.to(self._hidden.dtype)

    def _add_native(self, module: Any, tensors: dict[str, Tensor], places: Tensor) -> bool:
        """Whether it could be done so."""
        table = one_token_experts.table_of(module, tensors, self._hidden)
        if table is None:
            return False
        sizes = self._sizes(module, tensors, len(places))
        if not (sizes.up_step and sizes.down_step):
            return False
        numbers = len(places) * (2 * sizes.hidden + 3 * sizes.inner)
        scratch = torch.empty(numbers, dtype=torch.bfloat16)
        native_library.kernels().prompt_expert(
            gemv.addresses(lossless.arrays_of(tensors, "gate_up_proj")),
            gemv.addresses(lossless.arrays_of(tensors, "down_proj")),
            lossless.is_packed(tensors, "down_proj"),
            places.data_ptr(),
            len(places),
            self._hidden.data_ptr(),
            self._wide_weights.data_ptr(),
            table.data_ptr(),
            scratch.data_ptr(),
            self.outputs.data_ptr(),
            ctypes.byref(sizes),
            gemv.parallel(),
            torch.get_num_threads(),
        )
        return True

    def _sizes(self, module: Any, tensors: Mapping[str, Tensor], count: int) -> _Sizes:
        hidden, inner = matrices.shape_of(module, "down_proj")
        return _Sizes(
            tokens=len(self._hidden),
            top_k=self._weights.shape[1],
            hidden=hidden,
            inner=inner,
            up_step=_step_of(count, tensors, "gate_up_proj", (2 * inner, hidden)),
            down_step=_step_of(count, tensors, "down_proj", (hidden, inner)),
        )


def _step_of(
    num_tokens: int, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]
) -> int:
    if lossless.is_packed(tensors, name):
        return lossless.step_of(num_tokens, tensors, name, shape)
    return gemm.step_of(num_tokens, tensors[name])
