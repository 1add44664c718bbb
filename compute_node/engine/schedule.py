"""Whose turn it is: clients share the compute thread evenly."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Protocol

from compute_node.engine.job import Job
from proto import errors
from proto.stats import gauge

_MOST_CREDIT_S = 2.0  # a client that used little is not served alone for longer
_SMOOTHING = 0.2


class Room(Protocol):
    """Memory for sequences' state."""

    def reserve(self, num_tokens: int) -> bool:
        """Whether a sequence of at most that many tokens fits; then the room is its own until
        `free`. Called on the compute thread alone.
        """
        ...

    def free(self, num_tokens: int) -> None:
        """A sequence that had reserved as many is over."""
        ...


class Schedule:
    """Jobs that wait, and jobs that are alive and take turns. Any thread may submit and remove;
    the rest is the compute thread's.

    Clients are served by start-time fair queueing (Goyal et al., SIGCOMM 1996): the next turn is
    the client's that used the thread least, where one that comes starts at the least of those that
    are here.
    """

    def __init__(self, max_queued: int, room: Room) -> None:
        self._max_queued, self._room = max_queued, room
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._alive: list[Job] = []
        self._running: list[Job] = []  # the innermost last
        self._used_s: dict[str, float] = {}  # by client
        self._job_s = 0.0  # of the thread, a job, running mean

    @property
    @gauge("flashmoe_node_queued_requests", "Waiting", key="queued")
    def num_queued(self) -> int:
        return len(self._waiting)

    @property
    @gauge("flashmoe_node_live_sequences", "Requests that take turns", key="live")
    def num_alive(self) -> int:
        return len(self._alive)

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._alive

    @property
    def is_shared(self) -> bool:
        """Whether anybody is there beside the job that runs."""
        return len(self._alive) > 1 or bool(self._waiting)

    def submit(self, job: Job) -> None:
        """Raises QueueFull, which says how long to wait."""
        with self._changed:
            if len(self._waiting) >= self._max_queued:
                raise self._full()
            self._waiting.append(job)
            self._changed.notify()

    def remove(self, job: Job) -> None:
        """It waits no more, and frees its place at once. One that is alive is ended by its next
        turn, which is soon.
        """
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def wake(self) -> None:
        """`next` returns."""
        with self._changed:
            self._changed.notify()

    def jobs(self) -> list[Job]:
        with self._changed:
            return [*self._alive, *self._waiting]

    def next(self, timeout_s: float) -> Job | None:
        """Whose turn it is. None: nobody came within `timeout_s`."""
        with self._changed:
            if self.is_empty:
                self._changed.wait(timeout_s)
            self._admit()
        ended = next((job for job in self._alive if job.end_reason is not None), None)
        if ended is not None or not self._alive:
            return ended
        return min(self._alive, key=lambda one: (self._used_s[one.work.client], one.turn_ended_s))

    def answers(self) -> list[Job]:
        """Whose prompts are computed, and who is not in the midst of a turn; the one that has
        waited longest first.
        """
        idle = [job for job in self._alive if job.is_answering and job not in self._running]
        return sorted(idle, key=lambda job: job.turn_ended_s)

    def comes_another(self, job: Job, used_s: float) -> bool:
        """Whether one that came since has its first turn before `job` goes on. used_s: of the
        thread, in the turn that `job` has, which is within no other's
        """
        if len(self._running) > 1:
            return False
        if self._waiting:
            with self._changed:
                self._admit()
        most_s = self._used_s[job.work.client] + used_s
        return any(
            not one.has_begun and self._used_s[one.work.client] <= most_s for one in self._alive
        )

    def begin(self, job: Job) -> None:
        """Its turn begins, perhaps within another's."""
        self._running.append(job)

    def end(self, job: Job, used_s: float, *, goes_on: bool) -> None:
        """Its turn ends. used_s: of the thread, without turns of others within it"""
        self._running.remove(job)
        job.turn_ended_s = time.monotonic()
        job.used_s += used_s
        self._charge(job.work.client, used_s)
        if not goes_on:
            self._leave(job)

    def _charge(self, client: str, used_s: float) -> None:
        self._used_s[client] += used_s
        least_s = max(self._used_s.values()) - _MOST_CREDIT_S
        for other, other_s in self._used_s.items():
            self._used_s[other] = max(other_s, least_s)

    def _leave(self, job: Job) -> None:
        self._alive.remove(job)
        self._room.free(job.work.num_tokens)
        if all(other.work.client != job.work.client for other in self._alive):
            del self._used_s[job.work.client]
        share = _SMOOTHING if self._job_s else 1.0
        self._job_s += share * (job.used_s - self._job_s)

    def _admit(self) -> None:
        """What waits and fits comes alive, one of each client in turn. What does not fit is passed
        by nothing, or it might wait for ever.
        """
        for job in self._in_turn():
            if not self._room.reserve(job.work.num_tokens):
                return
            self._waiting.remove(job)
            self._used_s.setdefault(job.work.client, min(self._used_s.values(), default=0.0))
            self._alive.append(job)

    def _in_turn(self) -> list[Job]:
        """Those that wait: the first of each client, then the second of each."""
        places = dict[str, int]()
        order = list[tuple[int, int, Job]]()
        for number, job in enumerate(self._waiting):
            place = places[job.work.client] = places.get(job.work.client, -1) + 1
            order.append((place, number, job))
        return [job for *_, job in sorted(order, key=lambda entry: entry[:2])]

    def _full(self) -> errors.QueueFull:
        """Half of what is here is through by then, if it takes as long as what was."""
        retry_s = max(1.0, self._job_s * (len(self._waiting) + len(self._alive)) / 2)
        return errors.QueueFull(
            f"{self._max_queued} requests are waiting already: retry in {retry_s:.0f} s",
            retry_after_s=retry_s,
        )
