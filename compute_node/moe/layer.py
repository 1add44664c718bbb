"""The experts implementation registered with transformers: cache first, store second, eager's
bits.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from compute_node.cache.expert_cache import ExpertCache
from compute_node.kernels import one_token_experts
from compute_node.kernels.feed_forward import feed_forward_each
from compute_node.kernels.prompt_experts import Prompt
from compute_node.moe.route import EXACT, Route, RoutePolicy
from compute_node.moe.step import LayerAccess, Step, current_step
from compute_node.predict.layer_timer import LayerTimer
from compute_node.predict.prefetcher import Prefetcher
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey

IMPLEMENTATION = "flashmoe"


class RoutedExperts:
    """One MoE layer's routed experts, computed on borrowed weights."""

    def __init__(
        self,
        layer: int,
        cache: ExpertCache,
        prefetcher: Prefetcher,
        timer: LayerTimer,
        policy: RoutePolicy = EXACT,
    ) -> None:
        self.layer = layer
        self._policy = policy
        self._resident = _ResidentOf(layer, cache)
        self._cache = cache
        self._prefetcher = prefetcher
        self._timer = timer

    def forward(
        self, module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """The weighted sum of the experts that the policy makes of each token's route. An exact
        policy's is bit-identical to transformers' eager experts on each sequence of the step alone.

        hidden: [T, D]; topk_ids: [T, K], ids past the last expert are transformers' mark for none;
        topk_weights: [T, K]

        Returns [T, D].
        Raises NotInStep and what the cache raises.
        """
        step = current_step()
        scores = step.scores.get(self.layer) if step.scores is not None else None
        route = self._policy.apply(Route(topk_ids, topk_weights, scores), self._resident)
        return self._compute(step, module, hidden, route)

    def _compute(self, step: Step, module: Any, hidden: Tensor, route: Route) -> Tensor:
        ids = route.ids.tolist()
        chosen = {e for row in ids for e in row if e < module.num_experts}
        hits, waves = self._borrow(step, sorted(chosen), hidden)
        step.accesses[self.layer] = LayerAccess(route.ids, route.weights, hits)
        if len(step.batch.parts) == 1:
            total = _total_of(module, hidden, route.ids, route.weights, ids)
            for wave in waves:
                total.add(wave)
            return total.result()
        totals = [
            # A copy, because kernels of torch round by the alignment of their operands.
            _total_of(module, hidden[rows].clone(), route.ids[rows], route.weights[rows], ids[rows])
            for rows in step.batch.rows
        ]
        for wave in waves:
            for total in totals:
                total.add([borrowed for borrowed in wave if borrowed.key.expert in total.experts])
        return torch.cat([total.result() for total in totals])

    def _borrow(
        self, step: Step, experts: list[int], hidden: Tensor
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """In decode, guesses about this layer are settled, and the next layers' are made."""
        layer, prefetcher = self.layer, self._prefetcher
        if not step.batch.is_decode:
            self._timer.leave()
            return self._cache.step(layer, experts, step.check)
        unguessed = prefetcher.settle(layer, [ExpertKey(layer, expert) for expert in experts])
        self._timer.enter(layer, unguessed)
        return self._cache.step(
            layer,
            experts,
            step.check,
            prefetcher.take_disproved,
            lambda: prefetcher.guess(layer, hidden),
        )


@dataclass(frozen=True)
class _ResidentOf:
    """Experts of one layer that are in the cache."""

    layer: int
    cache: ExpertCache

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, int) and ExpertKey(self.layer, expert) in self.cache


class _Total(Protocol):
    """The weighted sum of one sequence's experts in one layer, as they come."""

    @property
    def experts(self) -> Container[int]:
        """Those that some token of it chose."""

    def add(self, wave: list[Borrowed]) -> None:
        """Compute with these, each of which some token chose; they stay valid only for the call."""

    def result(self) -> Tensor:
        """[T, D], once all were added."""


def _total_of(
    module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, ids: list[list[int]]
) -> _Total:
    """ids: topk_ids once more"""
    if len(ids) == 1:
        experts = [e for e in ids[0] if e < module.num_experts]
        if len(set(experts)) == len(experts):
            gates = dict(zip(ids[0], topk_weights[0].tolist(), strict=True))
            return _OneToken(module, hidden, gates)
    return _ManyTokens(module, hidden, topk_ids, topk_weights)


class _OneToken:
    """Adds in ascending expert order, whatever order they came in. No expert is named twice.

    hidden: [1, D]; gates: weight of each chosen expert
    """

    def __init__(self, module: Any, hidden: Tensor, gates: dict[int, float]) -> None:
        self.experts = gates
        self._module, self._hidden = module, hidden
        self._table: Tensor | None = None
        self._parts: list[Tensor] = []
        self._added: list[int] = []

    def add(self, wave: list[Borrowed]) -> None:
        if not wave:
            return
        tensors = [borrowed.tensors for borrowed in wave]
        chosen = [borrowed.key.expert for borrowed in wave]
        if not self._added:
            self._table = one_token_experts.table_of(self._module, tensors[0], self._hidden)
        weights = [self.experts[expert] for expert in chosen]
        self._parts.append(_weighted(self._module, tensors, self._hidden, weights, self._table))
        self._added += chosen

    def result(self) -> Tensor:
        if not self._added:
            return torch.zeros_like(self._hidden)
        rows = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)  # [E, D]
        order = sorted(range(len(self._added)), key=self._added.__getitem__)
        if order != list(range(len(order))):
            rows = rows[order]
        return _add_rows(rows) if self._table is None else one_token_experts.add_rows(rows)


class _ManyTokens:
    """A prompt, and a token that names an expert twice (eager multiplies both choices at once,
    which rounds otherwise than one after the other): keeps each (token, k) output until all waves
    are through, then sums in eager's order.
    """

    def __init__(self, module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        self.experts = set(topk_ids.flatten().tolist())
        self._module = module
        self._prompt = Prompt(hidden.contiguous(), topk_ids, topk_weights, module.num_experts)

    def add(self, wave: list[Borrowed]) -> None:
        self._prompt.add(self._module, {b.key.expert: b.tensors for b in wave})

    def result(self) -> Tensor:
        return self._prompt.total()


def _weighted(
    module: Any,
    experts: list[dict[str, Tensor]],
    hidden: Tensor,
    weights: list[float],
    table: Tensor | None,
) -> Tensor:
    """One token's output of each expert, times its gate weight. Returns [E, D]."""
    if table is not None:
        return one_token_experts.feed_forward(module, experts, hidden, weights, table)
    outputs = feed_forward_each(module, experts, hidden)
    pairs = zip(outputs[:, None].unbind(), weights, strict=True)
    return torch.cat([output * weight for output, weight in pairs])


def _add_rows(rows: Tensor) -> Tensor:
    """[E, D] to [1, D], one rounding an addition."""
    total = torch.zeros_like(rows[:1])
    for row in rows[:, None].unbind():
        total += row
    return total


def _dispatch(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    routed: RoutedExperts = module.flashmoe
    return routed.forward(module, hidden, topk_ids, topk_weights)


def register() -> None:
    """Make `model.set_experts_implementation("flashmoe")` known to transformers."""
    ExpertsInterface.register(IMPLEMENTATION, _dispatch)
