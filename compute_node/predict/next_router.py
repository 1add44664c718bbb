"""Predicts from the next layers' routers, asked about this layer's hidden states: a residual stream
changes slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

from compute_node.predict.predictor import Guess, Seen


@dataclass(frozen=True)
class NextRouter:
    """Of one MoE layer. weight: [E, D]; bias: [E]; correction: [E], added after a sigmoid where the
    model chooses that way.
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None

    @classmethod
    def of(cls, router: Any, num_inputs: int, num_experts: int) -> NextRouter | None:
        """None: it has no weight that can be asked."""
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != (num_experts, num_inputs):
            return None
        return cls(
            weight,
            getattr(router, "bias", None),
            getattr(router, "e_score_correction_bias", None),
        )

    def scores(self, hidden: Tensor) -> Tensor:
        """Higher: sooner chosen. hidden: [T, D]. Returns [T, E]."""
        scores = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return scores if self.correction is None else scores.sigmoid() + self.correction

    def choose(self, hidden: Tensor, top_k: int) -> list[list[int]]:
        """Experts of each token by falling score. hidden: [T, D]."""
        chosen: list[list[int]] = self.scores(hidden).topk(top_k).indices.tolist()
        return chosen


@dataclass
class NextRouters:
    """A `Predictor`. routers: by MoE layer, those that can be asked; may grow."""

    routers: dict[int, NextRouter] = field(default_factory=dict)
    name: str = "next_router"

    def knows(self, layer: int) -> bool:
        return layer in self.routers

    def predict(self, seen: Seen, layer: int, top_k: int) -> list[Guess]:
        rows = self.routers[layer].choose(seen.hidden, top_k)
        return [
            Guess(rank, expert)
            for rank, row in enumerate(zip(*rows, strict=True))
            for expert in row
        ]
