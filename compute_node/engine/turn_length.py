"""How many tokens a sequence computes before another has its turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from proto.stats import gauge

_FIRST = 16  # tokens of a turn while nothing is measured
_SMOOTHING = 0.1
_MOST_LOST = 0.04
_TURNS_A_LOOK = 67  # a prime, or it would always be the same sequence


@dataclass
class TurnLength:
    """The first tokens after a change of sequence miss more: the cache holds what others used. A
    turn is as short as the misses measured by place within turns allow: on average a token loses at
    most 4 % of its time to the change, unless the longest turn is too short for that.

    read_s: seconds that a miss takes
    most:   tokens of the longest turn
    """

    read_s: Callable[[], float]
    most: int = 256
    _misses: list[float] = field(default_factory=list)  # by place within a turn, running means
    _token_s: float = 0.0
    _num_turns: int = 0

    @property
    @gauge("flashmoe_node_turn_tokens", "Tokens that a sequence computes in a turn", key="turn")
    def tokens(self) -> int:
        """What the misses over those that tokens settle to come to, of one turn, over what a token
        may lose. Longer turns are measured by and by: what tokens settle to is seen in the second
        half of those that were.
        """
        half = len(self._misses) // 2
        if len(self._misses) < min(_FIRST, self.most) or not half:
            return min(_FIRST, self.most)
        if not self.read_s() or not self._token_s:
            return 1
        settled = sum(self._misses[half:]) / len(self._misses[half:])
        lost_s = (sum(self._misses[:half]) - half * settled) * self.read_s()
        return max(1, min(self.most, math.ceil(lost_s / (_MOST_LOST * self._token_s))))

    def next(self) -> int:
        """Of the turn that begins. Now and then a longer one, to see whether misses settle to what
        they did.
        """
        self._num_turns += 1
        tokens = self.tokens
        longer = min(self.most, max(_FIRST, 2 * tokens))
        del self._misses[longer:]  # measured long ago
        return tokens if self._num_turns % _TURNS_A_LOOK else longer

    def heard(self, place: int, num_misses: int, token_s: float) -> None:
        """A token was computed. place: within its turn, from 0"""
        if place < len(self._misses):
            self._misses[place] += _SMOOTHING * (num_misses - self._misses[place])
        elif place == len(self._misses) < self.most:
            self._misses.append(num_misses)
        self._token_s += (_SMOOTHING if self._token_s else 1.0) * (token_s - self._token_s)
