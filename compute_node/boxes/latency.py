"""How long a worker takes, and from when on it is late."""

from __future__ import annotations

from collections import deque

_NUM_KEPT = 256
_LEAST_KNOWN = 16
_FIRST_S, _LEAST_S, _TIMES = 5.0, 0.05, 3.0


class Latency:
    """Of one kind of work. Seconds."""

    def __init__(self) -> None:
        self._took_s: deque[float] = deque(maxlen=_NUM_KEPT)
        self._late_s = _FIRST_S
        self._num_heard = 0

    def heard(self, took_s: float) -> None:
        self._took_s.append(took_s)
        self._num_heard += 1
        if len(self._took_s) >= _LEAST_KNOWN and self._num_heard % _LEAST_KNOWN == 0:
            ordered = sorted(self._took_s)
            p99_s = ordered[int(0.99 * (len(ordered) - 1))]
            self._late_s = max(_LEAST_S, _TIMES * p99_s)

    @property
    def late_s(self) -> float:
        """From when on the main node computes the work itself: three times the 99th percentile of
        the latest 256, at least 50 ms; 5 s while nothing is known.
        """
        return self._late_s
