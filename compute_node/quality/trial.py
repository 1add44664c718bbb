"""What checks have found of one way to decode since it came into force, and how soon the next is
due.
"""

from __future__ import annotations

from compute_node.quality.confidence import MeanBounds
from compute_node.quality.divergence import Divergence

MOST_NATS = 1.0  # of one token: what is more counts as this
ALPHA = 0.05  # that a way within its limit is ever taken for one beyond it
_OCTAVES, _STEPS = 6, 8  # of candidates on either side of the limit
_SHARES = [2 ** (step / 4 - 10) for step in range(38)]  # of tokens: 0.1 % to 60 %

_LEAST, _FEW, _SOME = 16, 256, 512  # checks
_OFTEN, _SOMETIMES, _RARELY = 4, 32, 128  # tokens a check
_PURSUED = 256  # checks of token after token; the next as many are half as frequent, and so on


class Trial:
    """limit: of the mean KL, nats a token

    kl:           of checked tokens
    disagreement: whether another token was likeliest: 1, else 0
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        steps = range(-_OCTAVES * _STEPS, _OCTAVES * _STEPS + 1)
        candidates = [limit * 2 ** (step / _STEPS) for step in steps]
        self.kl = MeanBounds(MOST_NATS, [one for one in candidates if one < MOST_NATS], ALPHA)
        self.disagreement = MeanBounds(1.0, _SHARES, ALPHA)
        self.num_tokens = 0
        self._num_pursued = 0
        self._next_check = _OFTEN

    def is_due(self) -> bool:
        """Whether the next token, which this counts, is to be checked."""
        self.num_tokens += 1
        if self.num_tokens < self._next_check:
            return False
        self._next_check = self.num_tokens + self._interval()
        return True

    def heard(self, found: Divergence) -> None:
        self.kl.add(found.kl)
        self.disagreement.add(float(not found.agrees))
        if self._is_suspect:
            self._num_pursued += 1
            self._next_check = min(self._next_check, self.num_tokens + self._interval())

    @property
    def is_beyond(self) -> bool:
        """Whether the mean is above the limit for sure, as far as ALPHA goes. Not for what the
        first tokens after a prompt cost: what it left resident fits them less than later ones.
        """
        return self.kl.num >= _LEAST and self.kl.against(self._limit) >= 1 / ALPHA

    @property
    def _is_suspect(self) -> bool:
        return (self.kl.mean or 0.0) > self._limit or self.kl.against(self._limit) > 1

    def _interval(self) -> int:
        """Often while little is known; token after token while it looks bad, until that has cost
        enough.
        """
        usual = _OFTEN if self.kl.num < _FEW else _SOMETIMES if self.kl.num < _SOME else _RARELY
        return min(usual, 1 << self._num_pursued // _PURSUED) if self._is_suspect else usual
