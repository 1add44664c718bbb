"""Predicts with the next layers' routers, asked about this layer's residual stream and what its
resident experts add to it: the stream changes slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

from compute_node.predict.predictor import EMBEDDING, Seen


@dataclass(frozen=True)
class NextRouter:
    """Of one MoE layer. weight: [E, D]; bias: [E]; correction: [E], added after a sigmoid where the
    model chooses that way. norm: what makes the router's input of the residual stream, [T, D] to
    [T, D]; None: not recognised.
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    norm: Callable[[Tensor], Tensor] | None = None

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

    def foresee(self, seen: Seen) -> Tensor:
        """Scores of what an earlier layer saw, [T, E]."""
        if self.norm is None or seen.stream is None or seen.output is None:
            return self.scores(seen.hidden)
        return self.scores(self.norm(seen.stream + seen.output))


@dataclass
class NextRouters:
    """A `Predictor`. routers: by MoE layer, those that can be asked; may grow."""

    routers: dict[int, NextRouter] = field(default_factory=dict)
    name: str = "next_router"

    def knows(self, seen: Seen, layer: int) -> bool:
        return layer in self.routers and seen.layer != EMBEDDING

    def scores(self, seen: Seen, layer: int) -> Tensor:
        return self.routers[layer].foresee(seen)

    def truth(self, layer: int, hidden: Tensor) -> Tensor:
        """What `scores` foretells, [T, E], once `layer` is reached: its router's own. hidden: what
        its experts get, [T, D]
        """
        return self.routers[layer].scores(hidden)
