"""How many tokens a sequence computes before another has its turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proto.stats import gauge

_LEAST_LOOK = 8  # places at the end of the longest turn: what misses settle to
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
    most: int = 64
    _token_s: float = 0.0
    _num_turns: int = 0

    def __post_init__(self) -> None:
        self._misses: list[float | None] = [None] * self.most  # by place within a turn

    @property
    @gauge("flashmoe_node_turn_tokens", "Tokens that a sequence computes in a turn", key="turn")
    def tokens(self) -> int:
        """The most where too little is measured yet."""
        misses = [one for one in self._misses if one is not None]
        if len(misses) < self.most:
            return self.most
        tail = misses[-_LEAST_LOOK:]
        settled = sum(tail) / len(tail)
        allowed = _MOST_LOST * self._token_s / self.read_s() if self.read_s() else float("inf")
        lengths = [1 << power for power in range(self.most.bit_length()) if 1 << power < self.most]
        lost = [sum(misses[:length]) / length - settled for length in lengths]
        fitting = (n for n, one in zip(lengths, lost, strict=True) if one <= allowed)
        return next(fitting, self.most)

    def next(self) -> int:
        """Of the turn that begins. Now and then the most, to see whether the misses of its last
        places are what they were.
        """
        self._num_turns += 1
        return self.tokens if self._num_turns % _TURNS_A_LOOK else self.most

    def heard(self, place: int, num_misses: int, token_s: float) -> None:
        """A token was computed. place: within its turn, from 0; beyond the last it counts as it"""
        at = min(place, self.most - 1)
        before = self._misses[at]
        self._misses[at] = (
            num_misses if before is None else before + _SMOOTHING * (num_misses - before)
        )
        self._token_s += (_SMOOTHING if self._token_s else 1.0) * (token_s - self._token_s)
