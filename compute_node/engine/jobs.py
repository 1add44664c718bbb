"""One compute thread behind a bounded queue; the event loop hands work in and takes results out."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proto import errors
from proto.stats import gauge

logger = logging.getLogger(__name__)

_IDLE_S = 0.2
_TELLING_S = 1.0

Outcome = TypeVar("Outcome")


@dataclass(eq=False)
class Job:
    """work: runs on the compute thread, given `check`; what it yields goes to `results`."""

    work: Callable[[Callable[[], None]], Iterator[Any]]
    deadline_s: float | None
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    queued_s: float = 0.0
    _end: errors.FlashMoEError | None = None
    _submitted_s: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Nobody waits for results any more."""
        self._end = self._end or errors.Cancelled("the caller went away")

    def end(self, error: errors.FlashMoEError) -> None:
        """The caller hears it at once; the work ends between layers."""
        self._end = error
        self._put(error)

    def check(self) -> None:
        """Raises Cancelled, DeadlineExceeded, or what the job was ended with; called between
        layers.
        """
        if self._end is not None:
            raise self._end
        if self.deadline_s is not None and time.monotonic() > self.deadline_s:
            raise errors.DeadlineExceeded("the request's deadline passed")

    def run(self) -> None:
        self.queued_s = time.monotonic() - self._submitted_s
        try:
            self.check()
            for result in self.work(self.check):
                self._put(result)
                self.check()
        except Exception as error:  # noqa: BLE001  carried to the caller, whatever it is
            self._put(error)
        else:
            self._put(None)

    def _put(self, result: Any) -> None:
        self.loop.call_soon_threadsafe(self.results.put_nowait, result)


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

    def cancel(self) -> None:
        """Does nothing: the caller of `do` waits until it is done."""


class ComputeThread:
    """Runs jobs one at a time, in order. Use as a context manager.

    idle:    called on the thread now and then while there is nothing to do, with a function that
             says whether there is by now
    grace_s: after `drain`, when gRPC ends what is left; a little before, jobs end by themselves and
             their callers hear why
    """

    def __init__(
        self,
        max_queued: int,
        idle: Callable[[Callable[[], bool]], None] = lambda _: None,
        grace_s: float = threading.TIMEOUT_MAX,
    ) -> None:
        self._idle = idle
        finish_s = max(grace_s - _TELLING_S, grace_s / 2)
        self._end_of_grace = threading.Timer(finish_s, self._end_all)
        self._end_of_grace.daemon = True
        self._jobs: queue.Queue[Job | _Errand] = queue.Queue(max_queued)
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._draining = False
        self._stopping = threading.Event()
        self._current: Job | _Errand | None = None

    def __enter__(self) -> ComputeThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._draining = True
        self._end_of_grace.cancel()
        self._stopping.set()
        if (current := self._current) is not None:
            current.cancel()
        self._thread.join()

    def do(self, work: Callable[[], Outcome]) -> Outcome:
        """What `work` returns, done on the thread; waits for it. Raises what it raises.

        For what has to be done by this thread before there are jobs.
        """
        errand = _Errand(work)
        self._jobs.put(errand)
        outcome: Outcome = errand.done.result()
        return outcome

    @property
    @gauge("flashmoe_node_queued_requests", "Waiting", key="queued")
    def num_queued(self) -> int:
        return self._jobs.qsize()

    def drain(self) -> None:
        """Take nothing more; what was taken has until shortly before grace_s to finish."""
        if not self._draining:
            self._draining = True
            self._end_of_grace.start()

    async def run(
        self, work: Callable[[Callable[[], None]], Iterator[Any]], timeout_s: float | None
    ) -> AsyncIterator[tuple[Job, Any]]:
        """What `work` yields, as it comes. Leaving the iteration cancels the job.

        Raises QueueFull, Unavailable while draining, and what `work` raises.
        """
        deadline_s = time.monotonic() + timeout_s if timeout_s is not None else None
        job = Job(work, deadline_s, asyncio.get_running_loop())
        self._submit(job)
        try:
            while (result := await job.results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield job, result
        finally:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        """Its place in the queue is free at once."""
        job.cancel()
        with self._jobs.mutex, suppress(ValueError):
            self._jobs.queue.remove(job)
            self._jobs.not_full.notify()

    def _end_all(self) -> None:
        stopping = errors.Unavailable("the node is stopping: retry when it is back")
        with self._jobs.mutex:
            jobs = [self._current, *self._jobs.queue]
        for job in jobs:
            if isinstance(job, Job):
                job.end(stopping)

    def _submit(self, job: Job) -> None:
        if self._draining:
            raise errors.Unavailable("the node is stopping: retry elsewhere")
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise errors.QueueFull(
                f"{self._jobs.maxsize} requests are waiting already: retry later"
            ) from None

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                if self._stopping.is_set():
                    return
                self._run_idle()
                continue
            self._current = job
            if self._stopping.is_set():  # looked at after the job can be found
                job.cancel()
            job.run()
            self._current = None

    def _has_work(self) -> bool:
        return self._stopping.is_set() or not self._jobs.empty()

    def _run_idle(self) -> None:
        try:
            self._idle(self._has_work)
        except (OSError, errors.FlashMoEError):
            logger.exception("idle work failed")  # the thread must outlive it
