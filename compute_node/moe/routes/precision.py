"""An expert that weighs little may be read in fewer bits (HOBBIT, arXiv 2411.01433: precision by
the gate weight of what comes before it).
"""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.moe.routes.token import TokenChoice

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Precision:
    """strength: in [0, 1]. An expert may be small where heavier ones hold at least 1 - strength of
    the chosen experts' gates: 1, all may; just below it, all but the best; 0, none.
    """

    strength: float

    def small(self, token: TokenChoice) -> frozenset[int]:
        """Of the chosen, those whose small record will do where nothing is resident."""
        order = sorted(token.chosen, key=lambda expert: (-token.gates[expert], expert))
        least = (1 - self.strength) * sum(token.gates[expert] for expert in order) - _ROUNDING
        found, before = set[int](), 0.0
        for expert in order:
            if self.strength and before >= least:
                found.add(expert)
            before += token.gates[expert]
        return frozenset(found)
