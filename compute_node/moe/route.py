"""What a router chose for a batch of tokens, and the policy that may choose otherwise."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compute_node.moe.routes.weighing import Weighing


@dataclass(frozen=True, slots=True)
class Route:
    """ids: [T, K], those past the last expert are transformers' mark for none; weights: [T, K];
    scores: [T, E], of all experts; None where the step does not keep them.

    weighing: how weights follow from scores; None where nobody asked, or it is not known yet
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor | None = None
    weighing: Weighing | None = None


class RoutePolicy(Protocol):
    """Says which experts compute what a router chose. Pure: holds nothing, changes nothing.

    needs_scores: it goes by scores and their weighing
    """

    @property
    def needs_scores(self) -> bool: ...

    def apply(self, route: Route, resident: Container[int]) -> Route:
        """The route to compute, of the same T. resident: experts of the layer that need no read."""
        ...


class ExactRoute:
    """What the router chose."""

    needs_scores = False

    def apply(self, route: Route, resident: Container[int]) -> Route:
        return route


EXACT = ExactRoute()
