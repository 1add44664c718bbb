"""What a router chose for a batch of tokens, and the policy that may choose otherwise."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """ids: [T, K], those past the last expert are transformers' mark for none; weights: [T, K];
    scores: [T, E], of all experts; None where the step does not keep them.
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor | None = None


class RoutePolicy(Protocol):
    """Says which experts compute what a router chose. Pure: holds nothing, changes nothing."""

    def apply(self, route: Route, resident: Container[int]) -> Route:
        """The route to compute, of the same T. resident: experts of the layer that need no read."""
        ...


class ExactRoute:
    """What the router chose."""

    def apply(self, route: Route, resident: Container[int]) -> Route:
        return route


EXACT = ExactRoute()
