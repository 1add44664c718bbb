"""An expert of low score that is not resident gives way to a resident one of like score (SMoE,
"importance-driven expert scheduling", arXiv 2508.18983, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from compute_node.moe.routes.token import TokenChoice, best_first


@dataclass(frozen=True)
class Substitute:
    """alpha: in [0, 1]. With s the best score that was not chosen: experts above (1 + alpha) s are
    always kept; others that are not resident give way to the best resident in [(1 - alpha) s, s],
    with its own weight, as far as there is one.
    """

    alpha: float

    def choose(self, token: TokenChoice, resident: Container[int]) -> list[int]:
        others = [e for e in best_first(token.gates) if e not in token.chosen]
        if not others:
            return list(token.chosen)
        limit = token.gates[others[0]]
        least = (1 - self.alpha) * limit
        substitutes = [e for e in others if e in resident and token.gates[e] >= least]
        found = list[int]()
        for expert in sorted(token.chosen, key=lambda chosen: -token.gates[chosen]):
            is_kept = expert in resident or token.gates[expert] > (1 + self.alpha) * limit
            found.append(expert if is_kept or not substitutes else substitutes.pop(0))
        return found
