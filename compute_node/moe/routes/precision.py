"""An expert that weighs little may be read in fewer bits (HOBBIT, arXiv 2411.01433: precision by
the gate weight of what comes before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDING = 1e-6  # of weights, which may not quite add up


@dataclass(frozen=True)
class Precision:
    """strength: in [0, 1]. An expert may be small where heavier ones hold at least 1 - strength of
    a token's weight: 1, all may; just below it, all but the heaviest; 0, none.
    """

    strength: float

    def small(self, experts: Sequence[int], weights: Sequence[float]) -> frozenset[int]:
        """Those whose small record will do where nothing is resident. weights: one an expert"""
        if not self.strength:
            return frozenset()
        least = (1 - self.strength - _ROUNDING) * sum(weights)
        exact, before = set[int](), 0.0
        for place in sorted(range(len(experts)), key=lambda place: -weights[place]):
            if before < least:
                exact.add(experts[place])
            before += weights[place]
        return frozenset(experts).difference(exact)
