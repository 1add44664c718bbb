"""One compute thread behind a bounded queue; the event loop hands work in and takes results out."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from compute_node.engine.job import Job, Work
from compute_node.engine.schedule import Schedule
from compute_node.engine.turn_length import TurnLength
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


@dataclass
class Meter:
    """What the thread measures of the tokens it computes.

    num_misses: of the cache, since it began
    read_s:     seconds that a miss takes
    """

    num_misses: Callable[[], int] = lambda: 0
    read_s: Callable[[], float] = lambda: 0.0


class ComputeThread:
    """Gives jobs their turns, one at a time. Use as a context manager.

    idle:    called on the thread now and then while there is nothing to do, with a function that
             says whether there is by now
    max_stall_s: prompts hold the thread no longer while answers wait for their turns
    max_turn_tokens: of one answer, before another has its turn
    grace_s: after `drain`, when gRPC ends what is left; a little before, jobs end by themselves and
             their callers hear why
    meter:   set once there is something to measure, before there are jobs
    """

    def __init__(
        self,
        schedule: Schedule,
        idle: Callable[[Callable[[], bool]], None] = lambda _: None,
        grace_s: float = threading.TIMEOUT_MAX,
        max_stall_s: float = 0.5,
        max_turn_tokens: int = 64,
    ) -> None:
        self.schedule, self._max_stall_s = schedule, max_stall_s
        self._idle = idle
        finish_s = max(grace_s - _TELLING_S, grace_s / 2)
        self._end_of_grace = threading.Timer(finish_s, self._end_all)
        self._end_of_grace.daemon = True
        self._errands: queue.SimpleQueue[_Errand] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._draining = False
        self._stopping = threading.Event()
        self._inner_s = 0.0  # turns within the turn that runs
        self._latest: Job | None = None  # who had the latest turn
        self._place = 0  # tokens it computed since others had theirs
        self._prompts_s = 0.0  # that prompts hold the thread, since an answer had a turn
        self._layer_began_s = 0.0  # of the prompt that is computed
        self.meter = Meter()
        self.turn_length = TurnLength(lambda: self.meter.read_s(), max_turn_tokens)

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
        job = Job(work, deadline_s, loop, self._others_wait, self._give_way)
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

    def _turn(self, job: Job) -> None:
        """One turn, perhaps within another's."""
        if self._stopping.is_set():  # looked at after the job can be found
            job.cancel()
        is_prompt = not job.is_answering
        if self._latest is not job:
            self._latest, self._place = job, 0
        self.schedule.begin(job)
        outer_s, self._inner_s = self._inner_s, 0.0
        began_s = self._layer_began_s = time.monotonic()
        goes_on = job.turn(self._count_of(job))
        now_s = time.monotonic()
        self._prompts_s = self._prompts_s + now_s - self._layer_began_s if is_prompt else 0.0
        spent_s = now_s - began_s
        self.schedule.end(job, spent_s - self._inner_s, goes_on=goes_on)
        self._inner_s = outer_s + spent_s

    def _count_of(self, job: Job) -> Callable[[Any], bool]:
        """Says of each result whether it is the last of the turn. A job that is alone gives the
        thread back after each, so that who comes is heard at once.
        """
        length = self.turn_length.next() if self.schedule.is_shared else 1
        misses, since_s = self.meter.num_misses(), time.monotonic()
        knows_token = job.is_answering  # the first comes from the prompt
        done = 0

        def is_last(_: Any) -> bool:
            nonlocal misses, since_s, knows_token, done
            misses_now, now_s = self.meter.num_misses(), time.monotonic()
            if knows_token:
                self.turn_length.heard(self._place, misses_now - misses, now_s - since_s)
                self._place += 1
            misses, since_s, knows_token = misses_now, now_s, True
            done += 1
            return done >= length

        return is_last

    def _others_wait(self) -> bool:
        """Between two layers of a prompt: whether answers wait, and prompts would hold the thread
        too long by the end of the next layer.
        """
        now_s = time.monotonic()
        layer_s, self._layer_began_s = now_s - self._layer_began_s, now_s
        self._prompts_s += layer_s
        is_due = self._prompts_s + layer_s >= self._max_stall_s
        return is_due and bool(self.schedule.answers())

    def _give_way(self) -> None:
        """Each answer that waits has a turn, within the prompt's."""
        for job in self.schedule.answers():
            self._turn(job)
        self._latest = None  # the cache will hold what the prompt used
        self._prompts_s, self._layer_began_s = 0.0, time.monotonic()

    def _has_work(self) -> bool:
        return self._stopping.is_set() or not self.schedule.is_empty

    def _run_idle(self) -> None:
        try:
            self._idle(self._has_work)
        except (OSError, errors.FlashMoEError):
            logger.exception("idle work failed")  # the thread must outlive it
