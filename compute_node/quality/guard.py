"""Keeps lossy decoding within its quality budget: what checks find to cost too much gives way to
what costs less, and is tried again later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from compute_node.client.result import QualityEstimate
from compute_node.quality.divergence import Divergence
from compute_node.quality.trial import Trial
from compute_node.quality.turns import Rung, Turn
from proto.quality import Budget
from proto.stats import counter, fact, gauge

logger = logging.getLogger(__name__)

FIRST_PATIENCE_TOKENS, _MOST_PATIENCE_TOKENS = 4096, 1 << 22
_KL = "flashmoe_node_quality_kl"
_CHANGES, _RUNGS = "flashmoe_node_quality_changes", "Rungs that a guard left for another"


class Guard:
    """Of one budget and node: `Turns` that all its sequences share. One thread.

    It begins with the loosest rung. Once the mean KL of a rung is above the budget's limit for
    sure, the next tighter one comes into force, exact at last. A rung that failed is tried again
    after a while, each time twice as long. While exact nothing is checked: what is resident is then
    what exact decoding keeps, and says nothing of a lossy rung.
    """

    num_tokens: int = counter(
        "flashmoe_node_quality_tokens", "Tokens decoded within a budget", key="quality_tokens"
    )
    num_lossy: int = counter(
        "flashmoe_node_quality_lossy_tokens",
        "Of these, by a lossy rung",
        key="quality_lossy_tokens",
    )
    num_checks: int = counter(
        "flashmoe_node_quality_checks", "Tokens compared with exact ones", key="quality_checks"
    )
    num_tightened: int = counter(_CHANGES, _RUNGS, key="quality_tightened", to="tighter")
    num_relaxed: int = counter(_CHANGES, _RUNGS, key="quality_relaxed", to="looser")

    def __init__(self, budget: Budget, rungs: Sequence[Rung]) -> None:
        """rungs: the exact one first, each looser than the one before"""
        self.budget, self.rungs = budget, rungs
        self._at = len(rungs) - 1
        self._patience = [FIRST_PATIENCE_TOKENS // 2] * len(rungs)  # of one that failed, tokens
        self._trial, self._num_trials = Trial(budget.kl_limit), 0

    @property
    @fact("what decodes within the budget", key="quality_route")
    def route(self) -> str:
        return self.rungs[self._at].route or "exact"

    @property
    @gauge("flashmoe_node_quality_rung", "0: exact; higher is looser", key="quality_rung")
    def rung(self) -> int:
        return self._at

    @property
    @gauge("flashmoe_node_quality_kl_limit", "Nats a token", key="quality_kl_limit")
    def kl_limit(self) -> float:
        return self.budget.kl_limit

    @property
    @gauge(_KL, "Mean nats a token of the rung in force", key="quality_kl")
    def kl(self) -> float | None:
        return self._trial.kl.mean

    @property
    @gauge(f"{_KL}_low", "Bound on it that holds at every moment", key="quality_kl_low")
    def kl_low(self) -> float | None:
        return self._trial.kl.low if self._trial.kl.num else None

    @property
    @gauge(f"{_KL}_high", "Bound on it that holds at every moment", key="quality_kl_high")
    def kl_high(self) -> float | None:
        return self._trial.kl.high if self._trial.kl.num else None

    @property
    @gauge(
        "flashmoe_node_quality_top1",
        "Share of checked tokens whose likeliest successor is the exact one",
        key="quality_top1",
    )
    def top1(self) -> float | None:
        found = self._trial.disagreement.mean
        return None if found is None else 1 - found

    @property
    def estimate(self) -> QualityEstimate | None:
        """None: nothing was checked yet of the rung in force."""
        kl, other = self._trial.kl, self._trial.disagreement
        if kl.mean is None or other.mean is None:
            return None
        route = self.rungs[self._at].route
        agree = (1 - other.mean, 1 - other.high, 1 - other.low)
        return QualityEstimate(route, kl.num, kl.mean, kl.low, kl.high, *agree)

    def next(self) -> Turn:
        self._relax_if_due()
        self.num_tokens += 1
        self.num_lossy += self._at > 0
        is_due = self._trial.is_due()
        return Turn(self.rungs[self._at], is_due and self._at > 0, self._num_trials)

    def heard(self, turn: Turn, found: Divergence) -> None:
        """Of another trial than the one that goes on, it counts for nothing."""
        if turn.trial != self._num_trials:
            return
        self.num_checks += 1
        self._trial.heard(found)
        if self._trial.is_beyond:
            self._patience[self._at] = min(2 * self._patience[self._at], _MOST_PATIENCE_TOKENS)
            self.num_tightened += 1
            self._go("quality tightened", self._at - 1)

    def _relax_if_due(self) -> None:
        looser = self._at + 1
        if looser == len(self.rungs) or self._trial.num_tokens < self._patience[looser]:
            return
        self.num_relaxed += 1
        self._go("quality relaxed", looser)

    def _go(self, event: str, rung: int) -> None:
        kl = self._trial.kl
        facts = {
            "budget": str(self.budget),
            "from_route": self.route,
            "tokens": self._trial.num_tokens,
        }
        facts |= {"kl": kl.mean, "kl_low": kl.low, "kl_limit": self.kl_limit, "checks": kl.num}
        self._at = rung
        logger.warning(event, extra=facts | {"to_route": self.route})
        self._trial, self._num_trials = Trial(self.budget.kl_limit), self._num_trials + 1
