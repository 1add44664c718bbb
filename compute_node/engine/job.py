"""One request on the compute thread: what it computes, and who hears what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from compute_node.engine.seat import Seat
from proto import errors


@dataclass(frozen=True)
class PromptPart:
    """Another part of a prompt is computed: nothing that the caller hears of."""

    num_computed: int


@dataclass(frozen=True)
class Work:
    """run:        yields a PromptPart after each part of a prompt, then results, one a token
    client:     whose it is: clients share the thread evenly
    num_tokens: that its sequence holds at most; 0: it keeps no state
    """

    run: Callable[[Seat], Iterator[Any]]
    client: str = ""
    num_tokens: int = 0


@dataclass(eq=False)
class Job:
    """One thread computes it, the event loop of its caller takes results out.

    seat:         of the thread's jobs; its check is the job's own
    is_answering: its prompt is computed
    queued_s:     from its submission to its first turn
    used_s:       of the thread, its own turns
    turn_ended_s: when its latest turn ended
    """

    work: Work
    deadline_s: float | None
    loop: asyncio.AbstractEventLoop
    seat: Seat
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    is_answering: bool = False
    queued_s: float = 0.0
    used_s: float = 0.0
    turn_ended_s: float = field(default_factory=time.monotonic)
    _end: errors.FlashMoEError | None = None
    _submitted_s: float = field(default_factory=time.monotonic)
    _results: Iterator[Any] | None = None

    @property
    def has_begun(self) -> bool:
        """It had a turn."""
        return self._results is not None

    @property
    def waited_s(self) -> float:
        """In which others had their turns, since its first."""
        return max(0.0, time.monotonic() - self._submitted_s - self.queued_s - self.used_s)

    @property
    def end_reason(self) -> errors.FlashMoEError | None:
        """Why its next turn ends it: Cancelled, DeadlineExceeded, or what it was ended with; None:
        it goes on.
        """
        if self._end is None and self.deadline_s is not None and time.monotonic() > self.deadline_s:
            return errors.DeadlineExceeded("the request's deadline passed")
        return self._end

    def cancel(self) -> None:
        """Nobody waits for results any more."""
        self._end = self._end or errors.Cancelled("the caller went away")

    def end(self, error: errors.FlashMoEError) -> None:
        """The caller hears it at once; the work ends between layers."""
        self._end = error
        self._put(error)

    def check(self) -> None:
        """Raises `end_reason`; called between layers."""
        if (reason := self.end_reason) is not None:
            raise reason

    def turn(self, is_over: Callable[[Any], bool]) -> bool:
        """Compute on until `is_over` says so of a result. Returns whether anything is left."""
        try:
            self.check()
            for result in self._resumed():
                if isinstance(result, PromptPart):
                    return True
                self.is_answering = True
                self._put(result)
                self.check()
                if is_over(result):
                    return True
        except Exception as error:  # noqa: BLE001  carried to the caller, whatever it is
            self.close()
            self._put(error)
        else:
            self._put(None)
        return False

    def close(self) -> None:
        """What the work holds is given back."""
        if isinstance(self._results, Generator):
            self._results.close()

    def _resumed(self) -> Iterator[Any]:
        if self._results is None:
            self.queued_s = time.monotonic() - self._submitted_s
            self._results = iter(self.work.run(replace(self.seat, check=self.check)))
        return self._results

    def _put(self, result: Any) -> None:
        self.loop.call_soon_threadsafe(self.results.put_nowait, result)
