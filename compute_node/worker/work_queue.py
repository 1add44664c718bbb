"""What a worker has to do, the most urgent first, on its one compute thread."""

from __future__ import annotations

import heapq
import logging
import os
import select
import threading
from collections.abc import Callable
from enum import IntEnum
from itertools import count

logger = logging.getLogger(__name__)


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
    """Any thread may put work in, and have a file watched. What is put in raises nothing. Use as a
    context manager once the thread that called `run` has ended.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Urgency, int, Callable[[], None]]] = []
        self._numbers, self._lock = count(), threading.Lock()
        self._readers: dict[int, Callable[[], None]] = {}
        self._wakes = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched = select.epoll()
        self._watched.register(self._wakes, select.EPOLLIN)
        self._is_stopping = False
        self._thread = 0  # which runs it

    def __enter__(self) -> WorkQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self._watched.close()
        os.close(self._wakes)

    def put(self, urgency: Urgency, work: Callable[[], None]) -> None:
        """Have it done, after what is as urgent and came before."""
        with self._lock:
            heapq.heappush(self._waiting, (urgency, next(self._numbers), work))
        if threading.get_ident() != self._thread:  # which looks before it sleeps
            os.eventfd_write(self._wakes, 1)

    def watch(self, file: int, read: Callable[[], None]) -> None:
        """Have `read` called on the compute thread whenever `file` can be read, also in the midst
        of work. It may put work in, and must not compute.
        """
        self._readers[file] = read
        self._watched.register(file, select.EPOLLIN)

    def forget(self, file: int) -> None:
        """Before it is closed. On the compute thread."""
        self._watched.unregister(file)
        del self._readers[file]

    def run(self) -> None:
        """Do what there is to do, and sleep while there is nothing, until `stop`."""
        self._thread = threading.get_ident()
        while not self._is_stopping:
            try:
                if not self.run_next(Urgency.PROMPT) and not self._is_stopping:
                    self._look(None)
            except Exception:
                logger.exception("work failed")

    def stop(self) -> None:
        """`run` returns after the work under way. Any thread."""
        self._is_stopping = True
        os.eventfd_write(self._wakes, 1)

    def run_next(self, least: Urgency) -> bool:
        """Do the most urgent work, if it is at least so urgent. On the compute thread, also in the
        midst of less urgent work. Returns whether there was any.
        """
        self._look(0)
        with self._lock:
            if not self._waiting or self._waiting[0][0] > least:
                return False
            _, _, work = heapq.heappop(self._waiting)
        work()
        return True

    def _look(self, timeout_s: float | None) -> None:
        """At the files that are watched. None: until there is something."""
        for file, _ in self._watched.poll(timeout_s):
            if file == self._wakes:
                os.eventfd_read(self._wakes)
            elif (read := self._readers.get(file)) is not None:
                read()
