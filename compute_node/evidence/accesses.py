"""What one decode step chose, as arrays: evidence sends it, a recording keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compute_node.moe.step import LayerAccess, Step
from proto import errors
from proto.access import RecordedStep
from proto.expert import ModelSpec


@dataclass(frozen=True)
class Recording:
    """What a request wants recorded of its decode steps.

    router_scores: of all experts, too
    predictions:   what predictors said of each layer before it was reached
    inputs:        what a router map reads, too; part of predictions
    """

    router_scores: bool = False
    predictions: bool = False
    inputs: bool = False


def recorded(spec: ModelSpec, step: Step, router_scores: bool) -> RecordedStep:
    """What a decode step of one sequence chose, and the routers' scores where they are wanted.

    Raises InvalidRequest when scores were to be kept of a layer whose router is not recognised.
    """
    layers = layers_of(spec, step.accesses)
    ids = torch.stack([access.ids[0] for access in layers])
    latest = _kept_scores(spec, step.scores) if router_scores and step.scores is not None else None
    return RecordedStep(
        num_experts=spec.num_experts,
        topk_ids=ids.numpy().astype(np.uint16),
        topk_weights=_half([access.weights[0] for access in layers]),
        router_scores=_half(latest) if latest else None,
    )


def _kept_scores(spec: ModelSpec, scores: Mapping[int, Tensor]) -> list[Tensor]:
    """[E] of each MoE layer."""
    unknown = [layer for layer in spec.moe_layers if layer not in scores]
    if unknown:
        raise errors.InvalidRequest(
            f"{spec.model_type}: layer {unknown[0]} chooses experts without scores that could be "
            "recorded: record without router scores"
        )
    return [scores[layer][0] for layer in spec.moe_layers]


def layers_of(spec: ModelSpec, accesses: Mapping[int, LayerAccess]) -> list[LayerAccess]:
    """In the order of the model's MoE layers."""
    return [accesses[layer] for layer in spec.moe_layers]


def _half(rows: list[Tensor]) -> NDArray[np.float16]:
    """[L, ...]; what half precision cannot hold becomes its largest number."""
    limit = float(np.finfo(np.float16).max)
    stacked = torch.stack(rows).float()
    packed: NDArray[np.float16] = stacked.clamp(-limit, limit).numpy().astype(np.float16)
    return packed
