"""Residents are preferred by a share of the token's range of logits ("Mixture of Cache-Conditional
Experts for Efficient Mobile Device Inference", arXiv 2412.00099, the cache prior).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from compute_node.moe.routes.token import TokenChoice, best_first


@dataclass(frozen=True)
class Prior:
    """strength: lambda, of the range, added to a resident's logit

    num_kept: the best experts, which are kept whether or not they are resident
    """

    strength: float
    num_kept: int = 1

    def choose(self, token: TokenChoice, resident: Container[int]) -> list[int]:
        bonus = self.strength * (max(token.logits) - min(token.logits))
        preferred = [
            logit + bonus * (expert in resident) for expert, logit in enumerate(token.logits)
        ]
        kept = best_first(token.logits)[: self.num_kept]
        others = [expert for expert in best_first(preferred) if expert not in kept]
        return [*kept, *others][: len(token.chosen)]
