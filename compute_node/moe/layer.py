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
from compute_node.kernels.expert_kernels import ExpertKernels
from compute_node.kernels.prompt import Prompt
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
        kernels: ExpertKernels,
        cache: ExpertCache,
        prefetcher: Prefetcher,
        timer: LayerTimer,
        policy: RoutePolicy = EXACT,
    ) -> None:
        self.layer, self._kernels = layer, kernels
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
        ids, num_experts = route.ids.tolist(), module.num_experts
        chosen = {e for row in ids for e in row if e < num_experts}
        hits, waves = self._borrow(step, sorted(chosen), hidden)
        step.accesses[self.layer] = LayerAccess(route.ids, route.weights, hits)
        if len(step.batch.parts) == 1:
            total = _total_of(self._kernels, num_experts, hidden, route, ids)
            for wave in waves:
                total.add(wave)
            return total.result()
        totals = [
            # A copy, because kernels of torch round by the alignment of their operands.
            _total_of(
                self._kernels,
                num_experts,
                hidden[rows].clone(),
                Route(route.ids[rows], route.weights[rows]),
                ids[rows],
            )
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
    kernels: ExpertKernels, num_experts: int, hidden: Tensor, route: Route, ids: list[list[int]]
) -> _Total:
    """ids: the route's once more"""
    if len(ids) == 1:
        experts = [e for e in ids[0] if e < num_experts]
        if len(set(experts)) == len(experts):
            gates = dict(zip(ids[0], route.weights[0].tolist(), strict=True))
            return _OneToken(kernels, hidden, gates)
    return _ManyTokens(kernels, num_experts, hidden, route)


class _OneToken:
    """Adds in ascending expert order, whatever order they came in. No expert is named twice.

    hidden: [1, D]; gates: weight of each chosen expert
    """

    def __init__(self, kernels: ExpertKernels, hidden: Tensor, gates: dict[int, float]) -> None:
        self.experts = gates
        self._kernels, self._hidden = kernels, hidden
        self._parts: list[Tensor] = []
        self._added: list[int] = []

    def add(self, wave: list[Borrowed]) -> None:
        if not wave:
            return
        tensors = [borrowed.tensors for borrowed in wave]
        chosen = [borrowed.key.expert for borrowed in wave]
        weights = [self.experts[expert] for expert in chosen]
        self._parts.append(self._kernels.one_token(tensors, self._hidden, weights))
        self._added += chosen

    def result(self) -> Tensor:
        if not self._added:
            return torch.zeros_like(self._hidden)
        rows = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)  # [E, D]
        order = sorted(range(len(self._added)), key=self._added.__getitem__)
        if order != list(range(len(order))):
            rows = rows[order]
        return self._kernels.add_up(rows)


class _ManyTokens:
    """A prompt, and a token that names an expert twice (eager multiplies both choices at once,
    which rounds otherwise than one after the other): keeps each (token, k) output until all waves
    are through, then sums in eager's order.
    """

    def __init__(
        self, kernels: ExpertKernels, num_experts: int, hidden: Tensor, route: Route
    ) -> None:
        self.experts = set(route.ids.flatten().tolist())
        self._kernels = kernels
        self._prompt = Prompt(hidden.contiguous(), route.ids, route.weights, num_experts)

    def add(self, wave: list[Borrowed]) -> None:
        self._kernels.many_tokens(self._prompt, {b.key.expert: b.tensors for b in wave})

    def result(self) -> Tensor:
        return self._prompt.total()


def _dispatch(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    routed: RoutedExperts = module.flashmoe
    return routed.forward(module, hidden, topk_ids, topk_weights)


def register() -> None:
    """Make `model.set_experts_implementation("flashmoe")` known to transformers."""
    ExpertsInterface.register(IMPLEMENTATION, _dispatch)
