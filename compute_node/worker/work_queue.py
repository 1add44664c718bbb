"""What a worker has to do, the most urgent first, on its one compute thread."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from itertools import count


class Urgency(IntEnum):
    """The lower, the sooner.

    PREPARE: it only has something read
    TOKEN:   an answer waits for it
    PROMPT:  many tokens at once
    """

    PREPARE = 0
    TOKEN = 1
    PROMPT = 2


class WorkQueue:
    """Any thread may put work in. What is put in raises nothing."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        """thread: the one that computes, whatever else it does"""
        self._thread = thread
        self._waiting: list[tuple[Urgency, int, Callable[[], None]]] = []
        self._numbers, self._lock = count(), threading.Lock()

    def put(self, urgency: Urgency, work: Callable[[], None]) -> None:
        """Have it done, after what is as urgent and came before."""
        with self._lock:
            heapq.heappush(self._waiting, (urgency, next(self._numbers), work))
        self._thread.submit(self.run_next, Urgency.PROMPT)

    def run_next(self, least: Urgency) -> bool:
        """Do the most urgent work, if it is at least so urgent. On the compute thread, also in the
        midst of less urgent work. Returns whether there was any.
        """
        with self._lock:
            if not self._waiting or self._waiting[0][0] > least:
                return False
            _, _, work = heapq.heappop(self._waiting)
        work()
        return True
