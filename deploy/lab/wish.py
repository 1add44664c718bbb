"""What the user of `flashmoe tune` wants: a quality budget, or a time a token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from deploy.lab.knob_search import Goal
from proto import errors
from proto.quality import Budget, QualityCard, Setting

DEFAULT = "1%"
_TIME = re.compile(r"(\d+\.?\d*|\.\d+)\s*(ms|s)", re.ASCII)
_UNIT_MS = {"ms": 1.0, "s": 1000.0}


@dataclass(frozen=True)
class Wish:
    """most_ms: of the mean time a token; None: there is a budget instead"""

    budget: Budget
    most_ms: float | None = None

    @classmethod
    def of(cls, quality: str | None, latency: str | None) -> Self:
        """Of what the command line says; neither: a budget of 1%. Raises InvalidRequest."""
        if latency is None:
            budget = Budget.parse(quality or DEFAULT)
            if not budget.fraction:
                raise errors.InvalidRequest(
                    "exact needs no tuning: give --quality 1%, or whatever perplexity may rise by"
                )
            return cls(budget)
        if quality is not None:
            raise errors.InvalidRequest("give --quality or --latency, not both")
        found = _TIME.fullmatch(latency.strip())
        most_ms = float(found[1]) * _UNIT_MS[found[2]] if found else 0.0
        if not most_ms:
            raise errors.InvalidRequest(
                f"latency {latency!r} is no time: give it as 80ms or 0.5s, above 0"
            )
        return cls(Budget(0.0), most_ms)

    def __str__(self) -> str:
        if self.most_ms is None:
            return f"a quality budget of {self.budget}"
        return f"at most {self.most_ms:g} ms a token"

    @property
    def goal(self) -> Goal:
        if self.most_ms is None:
            return Goal(most_loss=self.budget.fraction)
        return Goal(most_ms=self.most_ms)

    def choose(self, card: QualityCard) -> Setting:
        """The fastest within the budget; or the truest within the time, the fastest of all where
        none is.
        """
        if self.most_ms is None:
            return card.ladder(self.budget)[-1]
        in_time = [setting for setting in card.frontier if setting.token_ms <= self.most_ms]
        return in_time[0] if in_time else card.frontier[-1]

    def served(self, chosen: Setting) -> Budget:
        """What to serve what was chosen with: the budget asked for, or the least that allows it."""
        return chosen.least_budget.rounded_up if self.most_ms is not None else self.budget

    def check(self, chosen: Setting) -> None:
        """Raises InvalidRequest when what was chosen does not keep to the time."""
        if self.most_ms is not None and chosen.token_ms > self.most_ms:
            raise errors.InvalidRequest(
                f"no setting takes at most {self.most_ms:g} ms a token: the fastest, "
                f"{chosen.route or 'exact'}, takes {chosen.token_ms:.1f} ms; give more memory or "
                "time (the card is written)"
            )
