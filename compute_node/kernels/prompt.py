"""What a layer's experts make of many tokens: who goes where, and the sums."""

from __future__ import annotations

import torch
from torch import Tensor

from compute_node.kernels import gemv
from compute_node.native import binding

_LANES = 16  # of native one_token, which adds rows up


class Prompt:
    """One layer's step of a prompt.

    hidden: [T, D], contiguous; topk_ids: [T, K]; topk_weights: [T, K]
    outputs: [T, K, D], what the chosen experts made, weighted; zero until computed
    """

    def __init__(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_experts: int
    ) -> None:
        self.outputs = hidden.new_zeros(*topk_ids.shape, hidden.shape[-1])
        self.hidden, self._ids, self._weights = hidden, topk_ids, topk_weights
        self.wide_weights = topk_weights.float().contiguous()
        # Eager visits (k, token) in this order; a matmul's rows must not be permuted.
        chosen = topk_ids.T.reshape(-1)
        self._order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=num_experts + 1)
        self._ends = counts.cumsum(0).tolist()

    def places(self, expert: int) -> Tensor:
        """[t] int64, k * T + token of each choice of this expert."""
        return self._order[self._ends[expert - 1] if expert else 0 : self._ends[expert]]

    def inputs_of(self, expert: int) -> Tensor:
        """The tokens that chose it, [t, D]."""
        return self.hidden[self.places(expert) % len(self.hidden)]

    def put(self, expert: int, output: Tensor) -> None:
        """Keep what the expert made of `inputs_of` it, [t, D], times its gate weights."""
        places = self.places(expert)
        place, token = places // len(self.hidden), places % len(self.hidden)
        weighted = output * self._weights[token, place, None]
        self.outputs[token, place] = weighted.to(self.hidden.dtype)

    def made(self, expert: int) -> Tensor:
        """What the expert made of its tokens, weighted: [t, D], in the order of `places`."""
        places = self.places(expert)
        return self.outputs[places % len(self.hidden), places // len(self.hidden)]

    def take(self, expert: int, made: Tensor) -> None:
        """Keep what another box made of `inputs_of` the expert."""
        places = self.places(expert)
        self.outputs[places % len(self.hidden), places // len(self.hidden)] = made

    def total(self) -> Tensor:
        """[T, D], each token's sum, once all its experts were computed."""
        ordered = self._ids.sort(dim=1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            return self._total_by_torch()
        return combine(self.outputs, self._ids)

    def _total_by_torch(self) -> Tensor:
        """As eager adds: what one expert makes of both choices of it is rounded once."""
        total = torch.zeros_like(self.hidden)
        for expert in range(len(self._ends) - 1):
            if len(places := self.places(expert)):
                place, token = places // len(self.hidden), places % len(self.hidden)
                total.index_add_(0, token, self.outputs[token, place])
        return total


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
        return _add_in_order(outputs, order)
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


def _add_in_order(outputs: Tensor, order: Tensor) -> Tensor:
    """One rounding an addition. outputs: [T, K, D]; order: [T, K], which row comes when. Returns
    [T, D].
    """
    rows = torch.arange(outputs.shape[0])
    total = torch.zeros_like(outputs[:, 0])
    for k in range(outputs.shape[1]):
        total += outputs[rows, order[:, k]]
    return total
