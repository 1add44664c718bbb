"""The experts implementation registered with transformers: routes are applied, computed by a
backend, and summed with eager's bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from compute_node.kernels.variant_kernels import VariantKernels
from compute_node.moe.backend import ExpertBackend
from compute_node.moe.route import Route
from compute_node.moe.routes.weighing import WeighingWatch, shares
from compute_node.moe.step import LayerAccess, Step, current_step
from compute_node.moe.sums import Sum, sum_of

IMPLEMENTATION = "flashmoe"


class RoutedExperts:
    """One MoE layer's routed experts."""

    def __init__(
        self,
        layer: int,
        kernels: VariantKernels,
        backend: ExpertBackend,
    ) -> None:
        self.layer = layer
        self._kernels, self._backend = kernels, backend
        self._weighing = WeighingWatch(layer)

    def forward(
        self, module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """The weighted sum of the experts that the step's policy makes of each token's route. The
        exact one's is bit-identical to transformers' eager experts, each sequence alone.

        hidden: [T, D]; topk_ids: [T, K], ids past the last expert are transformers' mark for none;
        topk_weights: [T, K]

        Returns [T, D].
        Raises NotInStep and what the backend raises.
        """
        step = current_step()
        if step.emulation is not None:
            route = Route(topk_ids, topk_weights)
            return step.emulation.experts(
                self.layer, self._kernels.exact, module.num_experts, hidden, route
            )
        step.give_way()
        num_experts = module.num_experts
        route = self._route(step, num_experts, topk_ids, topk_weights)
        ids = route.ids.tolist()
        chosen = {expert for row in ids for expert in row if expert < num_experts}
        sums = self._sums(step, num_experts, hidden, route, ids)
        small = route.small_experts & chosen
        if step.shadow is not None:
            step.shadow.reached(self.layer, sorted(chosen))
        hits = self._backend.run(step, hidden, route, sorted(chosen), sums, small)
        step.accesses[self.layer] = LayerAccess(topk_ids, topk_weights, hits)
        return sums[0].result() if len(sums) == 1 else torch.cat([one.result() for one in sums])

    def _route(self, step: Step, num_experts: int, topk_ids: Tensor, topk_weights: Tensor) -> Route:
        """What the step's policy makes of it."""
        scores = step.scores.get(self.layer) if step.scores is not None else None
        route = Route(topk_ids, topk_weights, scores)
        if step.policy.needs_scores:
            weighing = self._weighing.look(scores, topk_ids, topk_weights)
            route = replace(route, weighing=weighing)
        if step.gates is not None:
            weighing = route.weighing
            if not step.policy.needs_scores:
                weighing = self._weighing.glance(scores, topk_ids, topk_weights)
            step.gates[self.layer] = shares(weighing, scores, topk_ids, topk_weights, num_experts)
        found = step.policy.apply(route, self._backend.resident)
        if found is not route:
            num_missing, num_skipped = _num_changed(route.ids, found.ids, num_experts)
            step.num_skipped += num_skipped
            step.num_substituted += num_missing - num_skipped
        return found

    def _sums(
        self, step: Step, num_experts: int, hidden: Tensor, route: Route, ids: list[list[int]]
    ) -> list[Sum]:
        """One a sequence. ids: the route's once more"""
        if len(step.batch.parts) == 1:
            return [sum_of(self._kernels, num_experts, hidden, route, ids)]
        return [
            # A copy, because kernels of torch round by the alignment of their operands.
            sum_of(
                self._kernels,
                num_experts,
                hidden[rows].clone(),
                Route(route.ids[rows], route.weights[rows]),
                ids[rows],
            )
            for rows in step.batch.rows
        ]


def _num_changed(chosen: Tensor, computed: Tensor, num_experts: int) -> tuple[int, int]:
    """Chosen experts that are not computed, and how many of these nothing is computed for.

    chosen, computed: [T, K], ids from `num_experts` on are no experts
    """
    num_missing = num_skipped = 0
    for before, after in zip(chosen.tolist(), computed.tolist(), strict=True):
        wanted, used = ({e for e in row if e < num_experts} for row in (before, after))
        num_missing += len(wanted - used)
        num_skipped += len(wanted) - len(used)
    return num_missing, num_skipped


def _dispatch(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    routed: RoutedExperts = module.flashmoe
    return routed.forward(module, hidden, topk_ids, topk_weights)


def register() -> None:
    """Make `model.set_experts_implementation("flashmoe")` known to transformers."""
    ExpertsInterface.register(IMPLEMENTATION, _dispatch)
