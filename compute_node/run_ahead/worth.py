"""Whether running ahead pays: there are waits, long enough for it to foresee something, and the
processor has time for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_SMOOTHING = 0.05
_LEAST_FORESAW = 0.2  # second passes that foresaw anything, of all
_LEAST_COMPUTED = 0.75  # time that this thread had the processor, of what it wanted it for
_LEAST_WAIT_S = 0.0005  # of a token: less than a second pass takes to begin
_PROBE_TOKENS = 64  # what did not pay is tried again this often


@dataclass
class Spent:
    """seconds: of the clock"""

    seconds: float = 0.0


@dataclass
class Worth:
    """One thread. Running means start with what lets it try.

    clock, cpu_clock: seconds, of the world and of this thread on a processor
    """

    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.thread_time
    _wait_s: float = 0.01  # of a token
    _waited_s: float = 0.0  # of all, when last asked
    _foresaw: float = 1.0
    _computed: float = 1.0
    _num_asked: int = 0

    def is_due(self, waited_s: float) -> bool:
        """Asked once a token. waited_s: by the true pass, for experts, since start"""
        self._wait_s += _SMOOTHING * (waited_s - self._waited_s - self._wait_s)
        self._waited_s = waited_s
        self._num_asked += 1
        if self._num_asked % _PROBE_TOKENS == 0:
            return True
        pays = self._foresaw > _LEAST_FORESAW and self._computed > _LEAST_COMPUTED
        return pays and self._wait_s > _LEAST_WAIT_S

    def ended(self, foresaw: bool) -> None:
        """A second pass ended. foresaw: it came to a later layer's router."""
        self._foresaw += _SMOOTHING * (foresaw - self._foresaw)

    @contextmanager
    def measured(self) -> Iterator[Spent]:
        """A part of a second pass, in the block."""
        start_s, cpu_s, spent = self.clock(), self.cpu_clock(), Spent()
        try:
            yield spent
        finally:
            spent.seconds = self.clock() - start_s
            if spent.seconds > 0:
                share = (self.cpu_clock() - cpu_s) / spent.seconds
                self._computed += _SMOOTHING * (min(1.0, share) - self._computed)
