"""The experts implementation registered with transformers: cache first, store second, eager's
bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from compute_node.cache.expert_cache import ExpertCache
from compute_node.kernels import one_token_experts
from compute_node.kernels.feed_forward import feed_forward_each
from compute_node.kernels.prompt_experts import Prompt
from compute_node.predict.overlap import Overlap
from compute_node.predict.prefetcher import Prefetcher
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey

IMPLEMENTATION = "flashmoe"


@dataclass
class LayerAccess:
    """What one layer's step asked for. ids: [T, K]; weights: [T, K]; hits: experts found
    resident.
    """

    ids: Tensor
    weights: Tensor
    hits: set[int]


@dataclass
class StepRecord:
    """What the latest forward pass asked of every MoE layer, by model layer number."""

    layers: dict[int, LayerAccess] = field(default_factory=dict)


class RoutedExperts:
    """One MoE layer's routed experts, computed on borrowed weights."""

    def __init__(
        self,
        layer: int,
        cache: ExpertCache,
        record: StepRecord,
        prefetcher: Prefetcher,
        overlap: Overlap,
    ) -> None:
        self.layer = layer
        self._cache = cache
        self._record = record
        self._prefetcher = prefetcher
        self._overlap = overlap

    def forward(
        self, module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """The weighted sum of each token's experts; bit-identical to transformers' eager experts.

        hidden: [T, D]; topk_ids: [T, K], ids past the last expert are transformers' mark for none;
        topk_weights: [T, K]

        Returns [T, D].
        Raises what the cache raises.
        """
        chosen = [e for e in topk_ids.flatten().tolist() if e < module.num_experts]
        experts = sorted(set(chosen))
        if hidden.shape[0] == 1:
            hits, waves = self._decode_step(experts, hidden)
            self._record.layers[self.layer] = LayerAccess(topk_ids, topk_weights, hits)
            compute = _one_token if len(experts) == len(chosen) else _many_tokens
            return compute(module, hidden, topk_ids, topk_weights, waves)
        self._overlap.leave()
        hits, waves = self._cache.step(self.layer, experts)
        self._record.layers[self.layer] = LayerAccess(topk_ids, topk_weights, hits)
        return _many_tokens(module, hidden, topk_ids, topk_weights, waves)

    def _decode_step(
        self, experts: list[int], hidden: Tensor
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """Its misses are asked for, wrong guesses about it withdrawn, the next layers' guessed."""
        layer, prefetcher = self.layer, self._prefetcher
        disproved = prefetcher.settle(layer, [ExpertKey(layer, expert) for expert in experts])
        self._overlap.enter(layer, prefetcher.latest_unguessed)
        return self._cache.step(layer, experts, disproved, lambda: prefetcher.guess(layer, hidden))


def _one_token(
    module: Any,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    waves: Iterable[list[Borrowed]],
) -> Tensor:
    """Decode: add in ascending expert order, whatever order they came in. No expert is named
    twice.
    """
    gates = dict(zip(topk_ids[0].tolist(), topk_weights[0].tolist(), strict=True))
    table: Tensor | None = None
    parts: list[Tensor] = []
    experts: list[int] = []
    for wave in waves:
        tensors = [borrowed.tensors for borrowed in wave]
        chosen = [borrowed.key.expert for borrowed in wave]
        if not experts:
            table = one_token_experts.table_of(module, tensors[0], hidden)
        weights = [gates[expert] for expert in chosen]
        parts.append(_weighted(module, tensors, hidden, weights, table))
        experts += chosen
    if not experts:
        return torch.zeros_like(hidden)
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)  # [E, D]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    if order != list(range(len(experts))):
        rows = rows[order]
    return _add_rows(rows) if table is None else one_token_experts.add_rows(rows)


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


def _many_tokens(
    module: Any,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    waves: Iterable[list[Borrowed]],
) -> Tensor:
    """Prefill, and a token that names an expert twice (eager multiplies both choices at once, which
    rounds otherwise than one after the other): keep each (token, k) output until all waves are
    through, then sum in eager's order.
    """
    prompt = Prompt(hidden.contiguous(), topk_ids, topk_weights, module.num_experts)
    for wave in waves:
        prompt.add(module, {borrowed.key.expert: borrowed.tensors for borrowed in wave})
    return prompt.total()


def _dispatch(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    routed: RoutedExperts = module.flashmoe
    return routed.forward(module, hidden, topk_ids, topk_weights)


def register() -> None:
    """Make `model.set_experts_implementation("flashmoe")` known to transformers."""
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _dispatch
