"""What one decode step chose, as arrays: evidence sends it, a recording keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compute_node.experts import LayerAccess, StepRecord
from compute_node.routers import RouterScores
from proto.expert import ModelSpec


@dataclass(frozen=True)
class Recording:
    """What a request wants to be told of its decode steps. router_scores: of all experts, too."""

    router_scores: bool = False


@dataclass(frozen=True)
class StepAccess:
    """One decode step of one sequence. L MoE layers, K experts a token, E experts a layer.

    topk_ids:      [L, K], in the router's order
    topk_weights:  [L, K], their gate weights
    router_scores: [L, E], as the router gave them; None when not asked for
    """

    num_experts: int
    topk_ids: NDArray[np.uint16]
    topk_weights: NDArray[np.float16]
    router_scores: NDArray[np.float16] | None = None

    @classmethod
    def of(cls, spec: ModelSpec, record: StepRecord, scores: RouterScores | None = None) -> Self:
        """Of the latest forward pass, which was of one token."""
        layers = layers_of(spec, record)
        ids = torch.stack([access.ids[0] for access in layers])
        latest = [scores.latest[layer][0] for layer in spec.moe_layers] if scores else None
        return cls(
            num_experts=spec.num_experts,
            topk_ids=ids.numpy().astype(np.uint16),
            topk_weights=_half([access.weights[0] for access in layers]),
            router_scores=_half(latest) if latest else None,
        )


def layers_of(spec: ModelSpec, record: StepRecord) -> list[LayerAccess]:
    """In the order of the model's MoE layers."""
    return [record.layers[layer] for layer in spec.moe_layers]


def _half(rows: list[Tensor]) -> NDArray[np.float16]:
    """[L, ...]; what half precision cannot hold becomes its largest number."""
    limit = float(np.finfo(np.float16).max)
    stacked = torch.stack(rows).float()
    packed: NDArray[np.float16] = stacked.clamp(-limit, limit).numpy().astype(np.float16)
    return packed
