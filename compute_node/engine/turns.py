"""When the turn of a job is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compute_node.engine.job import Job
from compute_node.engine.schedule import Schedule
from compute_node.engine.turn_length import TurnLength


@dataclass
class Meter:
    """What the thread measures of the tokens it computes.

    num_misses: of the cache, since it began
    read_s:     seconds that a miss takes
    """

    num_misses: Callable[[], int] = lambda: 0
    read_s: Callable[[], float] = lambda: 0.0


class Turns:
    """Of the jobs of one compute thread.

    meter: set once there is something to measure, before there are jobs
    """

    def __init__(self, schedule: Schedule, most_tokens: int) -> None:
        self.meter = Meter()
        self.length = TurnLength(lambda: self.meter.read_s(), most_tokens)
        self._schedule = schedule
        self._latest: Job | None = None  # who had the latest turn
        self._place = 0  # tokens it computed since others had theirs

    def begin(self, job: Job, most_s: float = math.inf) -> Turn:
        """A job that is alone gives the thread back after each token, so that who comes is heard
        at once. most_s: it lasts no longer, but for its first token
        """
        if self._latest is not job:
            self._latest, self._place = job, 0
        most_tokens = self.length.next() if self._schedule.is_shared else 1
        return Turn(self, job, most_tokens, time.monotonic() + most_s)

    def change(self) -> None:
        """The cache will hold what others used."""
        self._latest = None

    def heard(self, num_misses: int, token_s: float) -> None:
        """The job that had the latest turn computed a token."""
        self.length.heard(self._place, num_misses, token_s)
        self._place += 1

    def comes_another(self, job: Job, used_s: float) -> bool:
        """Whether one that came meanwhile has its first turn before `job` goes on."""
        return self._schedule.comes_another(job, used_s)


class Turn:
    """One that has begun: called with each result, says whether it was the last."""

    def __init__(self, turns: Turns, job: Job, most_tokens: int, until_s: float) -> None:
        self._turns, self._job, self._until_s = turns, job, until_s
        self._most_tokens, self._num_tokens = most_tokens, 0
        self._is_answer = job.is_answering  # the first token comes from the prompt
        self._misses, self._began_s = turns.meter.num_misses(), time.monotonic()
        self._token_began_s = self._began_s

    def __call__(self, _: Any) -> bool:
        misses, now_s = self._turns.meter.num_misses(), time.monotonic()
        if self._is_answer:
            self._turns.heard(misses - self._misses, now_s - self._token_began_s)
        self._misses, self._token_began_s, self._is_answer = misses, now_s, True
        self._num_tokens += 1
        return (
            self._num_tokens >= self._most_tokens
            or now_s >= self._until_s
            or self._turns.comes_another(self._job, now_s - self._began_s)
        )
