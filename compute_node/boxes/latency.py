"""How long a worker takes, and from when on it is late."""

from __future__ import annotations

from collections import deque

_NUM_KEPT = 256
_LEAST_KNOWN = 16
_TIMES = 3.0
_LEAST_S, _LEAST_AT_FIRST_S, _MOST_S = 0.2, 0.5, 30.0
_SLOW_S, _SLOW_TIMES = 0.05, 2.0


def slow_s(own_s: float) -> float:
    """From when on an answer has taken too long to be worth asking for: twice what the main node
    takes for the same by itself, at least 0.05 s. own_s: 0 is not known, then 30 s
    """
    return max(_SLOW_S, _SLOW_TIMES * own_s) if own_s else _MOST_S


class Latency:
    """Of one kind of work, by its size. Seconds."""

    def __init__(self) -> None:
        self._took_s: deque[float] = deque(maxlen=_NUM_KEPT)  # of work of size 1
        self._at_first_s = self._p99_s = 0.0
        self._num_heard = 0

    def tried(self, took_s: float) -> None:
        """By work of size 1, before there was any to do."""
        self._at_first_s = max(self._at_first_s, took_s)

    def heard(self, took_s: float, size: float) -> None:
        self._took_s.append(took_s / size)
        self._num_heard += 1
        if len(self._took_s) >= _LEAST_KNOWN and self._num_heard % _LEAST_KNOWN == 0:
            ordered = sorted(self._took_s)
            self._p99_s = ordered[int(0.99 * (len(ordered) - 1))]

    def late_s(self, size: float) -> float:
        """From when on the main node computes the work itself: three times the 99th percentile of
        the latest 256, at least 0.2 s; at first three times what was tried, at least 0.5 s; never
        more than 30 s.
        """
        known_s, least_s = self._p99_s, _LEAST_S
        if not known_s:
            known_s, least_s = self._at_first_s, _LEAST_AT_FIRST_S
        return min(_MOST_S, max(least_s, _TIMES * known_s * size))
