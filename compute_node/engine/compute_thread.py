"""One compute thread behind a bounded queue; the event loop hands work in and takes results out."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from compute_node.engine.job import Job, Work
from compute_node.engine.prompt_pace import PromptPace
from compute_node.engine.schedule import Schedule
from compute_node.engine.seat import Seat
from compute_node.engine.turns import Turns
from proto import errors

logger = logging.getLogger(__name__)

_IDLE_S = 0.2
_TELLING_S = 1.0

Outcome = TypeVar("Outcome")


@dataclass(eq=False)
class _Errand:
    """A job of the node's own."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        try:
            self.done.set_result(self.work())
        except Exception as error:  # noqa: BLE001  carried to who waits, whatever it is
            self.done.set_exception(error)


class ComputeThread:
    """Gives jobs their turns, one at a time. Use as a context manager.

    idle:    called on the thread now and then while there is nothing to do, with a function that
             says whether there is by now
    max_stall_s: prompts hold the thread no longer while answers wait for their turns
    max_turn_tokens: of one answer, before another has its turn
    grace_s: after `drain`, when gRPC ends what is left; a little before, jobs end by themselves and
             their callers hear why
    """

    def __init__(
        self,
        schedule: Schedule,
        idle: Callable[[Callable[[], bool]], None] = lambda _: None,
        grace_s: float = threading.TIMEOUT_MAX,
        max_stall_s: float = 0.5,
        max_turn_tokens: int = 256,
    ) -> None:
        self.schedule, self.turns = schedule, Turns(schedule, max_turn_tokens)
        self._pace = PromptPace(max_stall_s)
        self._seat = Seat(
            others_wait=self._others_wait,
            give_way=self._give_way,
            num_portions=self._num_portions,
        )
        self._idle = idle
        finish_s = max(grace_s - _TELLING_S, grace_s / 2)
        self._end_of_grace = threading.Timer(finish_s, self._end_all)
        self._end_of_grace.daemon = True
        self._errands: queue.SimpleQueue[_Errand] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._draining = False
        self._stopping = threading.Event()
        self._inner_s = 0.0  # turns within the turn that runs

    def __enter__(self) -> ComputeThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._draining = True
        self._end_of_grace.cancel()
        self._stopping.set()
        for job in self.schedule.jobs():
            job.cancel()
        self.schedule.wake()
        self._thread.join()

    def do(self, work: Callable[[], Outcome]) -> Outcome:
        """What `work` returns, done on the thread; waits for it. Raises what it raises.

        For what has to be done by this thread before there are jobs.
        """
        errand = _Errand(work)
        self._errands.put(errand)
        self.schedule.wake()
        outcome: Outcome = errand.done.result()
        return outcome

    def drain(self) -> None:
        """Take nothing more; what was taken has until shortly before grace_s to finish."""
        if not self._draining:
            self._draining = True
            self._end_of_grace.start()

    async def run(self, work: Work, timeout_s: float | None) -> AsyncIterator[tuple[Job, Any]]:
        """What `work` yields, as it comes. Leaving the iteration cancels the job.

        Raises QueueFull, Unavailable while draining, and what `work` raises.
        """
        deadline_s = time.monotonic() + timeout_s if timeout_s is not None else None
        loop = asyncio.get_running_loop()
        job = Job(work, deadline_s, loop, self._seat)
        if self._draining:
            raise errors.Unavailable("the node is stopping: retry elsewhere")
        self.schedule.submit(job)
        try:
            while (result := await job.results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield job, result
        finally:
            job.cancel()
            self.schedule.remove(job)

    def _end_all(self) -> None:
        stopping = errors.Unavailable("the node is stopping: retry when it is back")
        for job in self.schedule.jobs():
            job.end(stopping)

    def _run(self) -> None:
        while True:
            while not self._errands.empty():
                self._errands.get().run()
            job = self.schedule.next(_IDLE_S)
            if job is not None:
                self._turn(job)
            elif self._stopping.is_set():
                return
            else:
                self._run_idle()

    def _turn(self, job: Job, most_s: float = math.inf) -> None:
        """One turn, perhaps within another's. most_s: of an answer's, but for its first token"""
        if self._stopping.is_set():  # looked at after the job can be found
            job.cancel()
        is_prompt = not job.is_answering
        if is_prompt:
            self._pace.begin()
        self.schedule.begin(job)
        outer_s, self._inner_s = self._inner_s, 0.0
        began_s = time.monotonic()
        goes_on = job.turn(self.turns.begin(job, most_s))
        spent_s = time.monotonic() - began_s
        if is_prompt:
            self._pace.end_portion()
        else:
            self._pace.end()
        self.schedule.end(job, spent_s - self._inner_s, goes_on=goes_on)
        self._inner_s = outer_s + spent_s

    def _others_wait(self) -> bool:
        """Between two portions of a prompt: whether answers wait, and prompts would hold the thread
        too long by the end of the next portion.
        """
        self._pace.end_portion()
        return self._pace.is_due and bool(self.schedule.answers())

    def _give_way(self) -> None:
        """Answers that wait have turns within the prompt's: together as long, each, as prompts
        held the thread; the one that waited longest comes first.
        """
        held_s = self._pace.held_s
        end_s = time.monotonic() + held_s * len(self.schedule.answers())
        while (answers := self.schedule.answers()) and time.monotonic() < end_s:
            self._turn(answers[0], min(held_s, end_s - time.monotonic()))
        self.turns.change()
        self._pace.begin()

    def _num_portions(self) -> int:
        num_portions = self._pace.num_portions()
        return num_portions if self.schedule.answers() else 1

    def _has_work(self) -> bool:
        return self._stopping.is_set() or not self.schedule.is_empty

    def _run_idle(self) -> None:
        try:
            self._idle(self._has_work)
        except (OSError, errors.FlashMoEError):
            logger.exception("idle work failed")  # the thread must outlive it
