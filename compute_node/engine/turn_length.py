"""How many tokens a sequence computes before another has its turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from proto.stats import gauge

_MOST = 16
_LENGTHS = (1, 2, 4, 8, _MOST)
_TAIL = slice(_MOST // 2, _MOST)
_SMOOTHING = 0.1
_MOST_LOST = 0.03
_TURNS_A_LOOK = 67  # a prime, or it would always be the same sequence


@dataclass
class TurnLength:
    """The first tokens after a change of sequence miss more: the cache holds what others used. A
    turn is as short as the misses measured by place within turns allow: on average a token loses at
    most 3 % of its time to the change.

    read_s: seconds that a miss takes
    """

    read_s: Callable[[], float]
    _misses: list[float | None] = field(default_factory=lambda: [None] * _MOST)
    _token_s: float = 0.0
    _num_turns: int = 0

    @property
    @gauge("flashmoe_node_turn_tokens", "Tokens that a sequence computes in a turn", key="turn")
    def tokens(self) -> int:
        """The most where too little is measured yet."""
        misses = [one for one in self._misses if one is not None]
        if len(misses) < _MOST:
            return _MOST
        settled = sum(misses[_TAIL]) / len(misses[_TAIL])
        allowed = _MOST_LOST * self._token_s / self.read_s() if self.read_s() else float("inf")
        lost = [sum(misses[:length]) / length - settled for length in _LENGTHS]
        fitting = (n for n, one in zip(_LENGTHS, lost, strict=True) if one <= allowed)
        return next(fitting, _MOST)

    def next(self) -> int:
        """Of the turn that begins. Now and then the most, to see whether the misses of its last
        places are what they were.
        """
        self._num_turns += 1
        return self.tokens if self._num_turns % _TURNS_A_LOOK else _MOST

    def heard(self, place: int, num_misses: int, token_s: float) -> None:
        """A token was computed. place: within its turn, from 0; beyond the last it counts as it"""
        at = min(place, _MOST - 1)
        before = self._misses[at]
        self._misses[at] = (
            num_misses if before is None else before + _SMOOTHING * (num_misses - before)
        )
        self._token_s += (_SMOOTHING if self._token_s else 1.0) * (token_s - self._token_s)
