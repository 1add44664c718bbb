"""How far lossy logits are from the exact ones of the same token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """kl: nats, of the exact distribution against the lossy one; 0 for equal logits

    agrees: both name the same likeliest token
    """

    kl: float
    agrees: bool

    @classmethod
    def of(cls, exact: Tensor, lossy: Tensor) -> Self:
        """exact, lossy: logits, [1, V]"""
        p, q = (logits[0].double().log_softmax(dim=-1) for logits in (exact, lossy))
        # A token that the exact model excludes (logit -inf) costs nothing.
        terms = (p.exp() * (p - q)).where(p > -float("inf"), p.new_zeros(()))
        return cls(max(0.0, float(terms.sum())), bool(p.argmax() == q.argmax()))
