"""An expert of low weight that is not resident is left out."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from compute_node.moe.routes.token import TokenChoice


@dataclass(frozen=True)
class Skip:
    """fraction: of an equal share, 1 / K, of the chosen experts' gates; what has less is left out.
    The best stays.
    """

    fraction: float

    def choose(self, token: TokenChoice, resident: Container[int]) -> list[int]:
        gates = [token.gates[expert] for expert in token.chosen]
        least, best = self.fraction * sum(gates) / len(gates), max(gates)
        return [
            expert
            for expert, gate in zip(token.chosen, gates, strict=True)
            if expert in resident or gate >= least or gate == best
        ]
