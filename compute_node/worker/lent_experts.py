"""Computes experts for main nodes on other boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compute_node.boxes.work import Work
from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.kernels.variant_kernels import VariantKernels
from compute_node.moe.route import Route
from compute_node.moe.sums import sum_of
from proto import errors
from proto.stats import counter


class LentExperts:
    """Experts of one store, through a cache of its own. One thread.

    num_works: requests answered; num_experts: computed in them
    """

    num_works: int = counter("flashmoe_worker_requests", "Requests answered", key="answered")
    num_experts: int = counter(
        "flashmoe_worker_experts", "Experts computed", key="experts_computed"
    )

    def __init__(
        self, kernels: Mapping[int, VariantKernels], num_experts: int, cache: ExpertCache
    ) -> None:
        """kernels: by model layer number; num_experts: of a layer"""
        self._kernels, self._num_experts, self._cache = kernels, num_experts, cache

    @torch.inference_mode()
    def compute(self, work: Work, check: Callable[[], None] = never) -> Tensor:
        """What these experts make of their tokens, with the bits that the main node's processor
        gives if it is of the same kind: [n, D], as `Sum.made`.

        Raises InvalidRequest for a layer or an expert that the model does not have,
        StoreUnavailable, WeightsDamaged, and what `check` raises.
        """
        kernels = self._kernels.get(work.layer)
        if kernels is None or not 0 <= work.experts[0] <= work.experts[-1] < self._num_experts:
            raise errors.InvalidRequest(
                f"the model has no experts {list(work.experts)} in layer {work.layer}"
            )
        route = Route(work.topk_ids, work.topk_weights)
        total = sum_of(kernels, self._num_experts, work.hidden, route, work.topk_ids.tolist())
        _, waves = self._cache.step(work.layer, work.experts, check)
        for wave in waves:
            total.add(wave)
        self.num_works += 1
        self.num_experts += len(work.experts)
        return total.made(work.experts)
