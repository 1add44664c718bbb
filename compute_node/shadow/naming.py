"""Says which experts a layer chose before they are computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from compute_node.moe.local import LocalBackend
from compute_node.moe.route import Route
from compute_node.moe.step import Step
from compute_node.moe.sums import Sum

Tell = Callable[[int, list[int]], None]
"""Called with a layer and the experts that its router chose, ascending."""


@dataclass
class Named:
    """Who hears it now."""

    tell: Tell | None = None


class NamingBackend:
    """All experts are resident: nothing is waited for."""

    def __init__(self, layer: int, local: LocalBackend, named: Named) -> None:
        self.resident = local.resident
        self._layer, self._local, self._named = layer, local, named

    def run(
        self,
        step: Step,
        hidden: Tensor,
        route: Route,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int] = (),
    ) -> set[int]:
        if self._named.tell is not None:
            self._named.tell(self._layer, list(experts))
        return self._local.run(step, hidden, route, experts, sums, small)
