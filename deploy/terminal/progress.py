"""How long work shows its progress: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from deploy.terminal import console
from expert_store.offline.checkpoint.progress import Report

_LINE_INTERVAL_S = 10.0


@dataclass
class NowAndThen:
    """Limits lines to one an interval. clock: seconds"""

    clock: Callable[[], float] = time.monotonic
    _last_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._last_s = self.clock()

    def elapsed_s(self) -> float:
        """The time since the last line when the next is due, and counts it as printed; else 0."""
        elapsed_s = self.clock() - self._last_s
        if elapsed_s < _LINE_INTERVAL_S:
            return 0.0
        self._last_s += elapsed_s
        return elapsed_s


@dataclass
class Lines:
    """Prints how much work is done, and how fast it went since the last line."""

    what: str
    say: Callable[[str], None]
    now_and_then: NowAndThen = field(default_factory=NowAndThen)
    _said_bytes: int = 0

    def report(self, done_bytes: int, total_bytes: int) -> None:
        elapsed_s = self.now_and_then.elapsed_s()
        if not elapsed_s or not total_bytes:
            return
        new_bytes = done_bytes - self._said_bytes
        if new_bytes < 0:  # another part of the work has begun
            new_bytes = done_bytes
        line = (
            f"{self.what}: {console.size(done_bytes)} of {console.size(total_bytes)} "
            f"({done_bytes / total_bytes:.0%}), {console.size(new_bytes / elapsed_s)}/s"
        )
        if new_bytes:
            left_s = (total_bytes - done_bytes) * elapsed_s / new_bytes
            line += f", {duration(left_s)} left"
        self.say(line)
        self._said_bytes = done_bytes


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """Show on stderr what the work within the block reports."""
    if console.err.is_terminal:
        with _bar(what) as report:
            yield report
    else:
        yield Lines(what, console.say).report


@contextmanager
def _bar(what: str) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.err) as bar:
        task = bar.add_task(what, total=None)

        def report(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield report
