"""Bounds on the mean of bounded numbers that hold at every moment, however often one looks: a
confidence sequence.

Testing by betting (Waudby-Smith & Ramdas, "Estimating means of bounded random variables by
betting", 2024, arXiv 2010.09686): a candidate is given up once a gambler who bets against it,
fairly if it is the mean, has 1 / alpha times what he began with. By Ville's inequality the mean
itself is given up with a probability of alpha at most, ever. The numbers need not be independent.
Where their mean, given what came before, changes, it was once as high as the lower bound, and once
as low as the upper one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Of the largest bet that cannot ruin. The first holds on to its money.
_STAKES = np.array([0.0, 0.01, 0.025, 0.06, 0.15, 0.35, 0.9])
# Of all money, dealt out anew after each bet, so that a mean that rises late is noticed, too (the
# fixed share of Herbster & Warmuth, "Tracking the best expert", 1998).
_DEALT = 1e-3
_RICH = 1e100  # enough for every alpha; more would overflow


class Gamblers:
    """One for each candidate, who spreads his money over several stakes."""

    def __init__(self, num_candidates: int) -> None:
        self._money = np.full((num_candidates, len(_STAKES)), 1 / len(_STAKES))

    def bet(self, gains: NDArray[np.float64]) -> NDArray[np.float64]:
        """gains: of the largest bet, -1 or more, for each candidate. Returns what each has now."""
        money = self._money * (1 + _STAKES * gains[:, None])
        total: NDArray[np.float64] = money.sum(axis=1)
        dealt = (1 - _DEALT) * money + _DEALT * total[:, None] / len(_STAKES)
        self._money = dealt / np.maximum(1, total / _RICH)[:, None]
        return total


class MeanBounds:
    """Of numbers from 0 to `bound`; what is above counts as `bound`.

    low, high: each is wrong with a probability of alpha at most, ever
    """

    def __init__(self, bound: float, candidates: Sequence[float], alpha: float) -> None:
        """candidates: what low and high may be, between 0 and bound, ascending"""
        self.num = 0
        self.low, self.high = 0.0, bound
        self._bound, self._least = bound, 1 / alpha
        self._candidates = np.array(candidates, dtype=np.float64)
        self._above, self._below = Gamblers(len(candidates)), Gamblers(len(candidates))
        self._total = 0.0
        self._against = np.ones(len(candidates))

    @property
    def mean(self) -> float | None:
        """None: of nothing"""
        return self._total / self.num if self.num else None

    def against(self, candidate: float) -> float:
        """What who bets that the mean is above a candidate has by now; he began with 1."""
        return float(self._against[np.searchsorted(self._candidates, candidate * (1 - 1e-9))])

    def add(self, number: float) -> None:
        """number: 0 or more"""
        number = min(number, self._bound)
        self.num += 1
        self._total += number
        self._against = too_low = self._above.bet(number / self._candidates - 1)
        gains = (self._candidates - number) / (self._bound - self._candidates)
        too_high = self._below.bet(gains)
        self.low = max(self.low, *self._candidates[too_low >= self._least], 0.0)
        self.high = min(self.high, *self._candidates[too_high >= self._least], self._bound)
