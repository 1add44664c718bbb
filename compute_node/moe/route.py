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
    small:    of each token, the experts that a record of fewer bits will do for; empty: of none
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor | None = None
    weighing: Weighing | None = None
    small: tuple[frozenset[int], ...] = ()

    @property
    def small_experts(self) -> frozenset[int]:
        """Those that it will do for wherever they are chosen."""
        if not self.small:
            return frozenset()
        needed = zip(self.ids.tolist(), self.small, strict=True)
        exact = {expert for chosen, small in needed for expert in chosen if expert not in small}
        return frozenset().union(*self.small) - exact


class RoutePolicy(Protocol):
    """Says which experts compute what a router chose. Pure: holds nothing, changes nothing.

    needs_scores: it goes by scores and their weighing
    needs_small:  it lets records of fewer bits do
    """

    @property
    def needs_scores(self) -> bool: ...

    @property
    def needs_small(self) -> bool: ...

    def apply(self, route: Route, resident: Container[int]) -> Route:
        """The route to compute, of the same T. resident: experts of the layer that need no read."""
        ...


class ExactRoute:
    """What the router chose."""

    needs_scores = False
    needs_small = False

    def apply(self, route: Route, resident: Container[int]) -> Route:
        return route


EXACT = ExactRoute()


def is_exact(policy: RoutePolicy) -> bool:
    """Whether the routers decide alone, and experts are computed in full."""
    return not (policy.needs_scores or policy.needs_small)
