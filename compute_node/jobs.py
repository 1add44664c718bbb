"""One compute thread behind a bounded queue; the event loop hands work in and takes results out."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proto import errors

logger = logging.getLogger(__name__)

_IDLE_S = 0.2

Outcome = TypeVar("Outcome")


@dataclass(eq=False)
class Job:
    """work: runs on the compute thread, given `check`; what it yields goes to `results`."""

    work: Callable[[Callable[[], None]], Iterator[Any]]
    deadline_s: float | None
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    queued_s: float = 0.0
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _submitted_s: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded; called between layers."""
        if self._cancelled.is_set():
            raise errors.Cancelled("the caller went away")
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
        """Who asked waits for it: it is done."""


class ComputeThread:
    """Runs jobs one at a time, in order. Use as a context manager.

    idle: called on the thread now and then while there is nothing to do
    """

    def __init__(self, max_queued: int, idle: Callable[[], None] = lambda: None) -> None:
        self._idle = idle
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
        self._stopping.set()
        if self._current is not None:
            self._current.cancel()
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
    def num_queued(self) -> int:
        return self._jobs.qsize()

    def drain(self) -> None:
        """Take nothing more; what was taken is finished."""
        self._draining = True

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
            job.cancel()

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
            if self._stopping.is_set():
                job.cancel()
            self._current = job
            job.run()
            self._current = None

    def _run_idle(self) -> None:
        try:
            self._idle()
        except (OSError, errors.FlashMoEError):
            logger.exception("idle work failed")  # the thread must outlive it
