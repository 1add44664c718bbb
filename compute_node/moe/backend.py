"""Where a layer's experts are computed."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from typing import Protocol

from torch import Tensor

from compute_node.moe.route import Route
from compute_node.moe.step import Step
from compute_node.moe.sums import Sum


class ExpertBackend(Protocol):
    """Computes one layer's experts, and hands what they make to sums, which add it up: so no bit
    depends on where or when an expert was computed.

    resident: numbers of the experts that need no read
    """

    @property
    def resident(self) -> Container[int]: ...

    def run(
        self,
        step: Step,
        hidden: Tensor,
        route: Route,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int] = (),
    ) -> set[int]:
        """Add each of these experts to the sums of the sequences that chose it. Blocks until all
        are computed.

        hidden: [T, D], of all sequences; route: theirs; experts: of it, distinct, ascending; sums:
        one a sequence; small: experts that a record of fewer bits will do for

        Returns those that were resident. Raises what `step.check` raises, StoreUnavailable,
        ExpertDamaged and StaleLease; sums are then worth nothing.
        """
        ...
