"""When a worker is left alone for a while."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

_MOST_MISSED = 3  # answers in a row, then it is left alone for a while:
_TIMES_LOST = 20  # as many times as long as they took, so that a slow box costs a twentieth
_LEAST_S = 10.0


class Rest:
    """Of a worker whose answers were late, failed, or slower than the main node by itself, three in
    a row.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._num_missed_in_a_row = 0
        self._lost_s = 0.0  # by those
        self._until_s = 0.0

    def __bool__(self) -> bool:
        """Whether it rests now."""
        return time.monotonic() < self._until_s

    def end(self) -> None:
        """It is tried again."""
        self._until_s = 0.0

    def came(self) -> None:
        """An answer in time."""
        self._num_missed_in_a_row, self._lost_s = 0, 0.0

    def missed(self, lost_s: float) -> None:
        """An answer that was none, after so long."""
        self._num_missed_in_a_row += 1
        self._lost_s += lost_s
        if self._num_missed_in_a_row >= _MOST_MISSED:
            rest_s = max(_LEAST_S, _TIMES_LOST * self._lost_s)
            self._until_s = time.monotonic() + rest_s
            self.came()
            logger.warning("worker rests", extra={"box": self._address, "for_s": round(rest_s)})
