"""Signals that ask the command to stop: it finishes what it must, instead of ending at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# Waits until a condition holds, and meanwhile keeps alive what has to be.
Wait = Callable[[Callable[[], bool]], None]


def stop_flag() -> Callable[[], bool]:
    """A function that returns True once SIGTERM, SIGINT or SIGHUP came. A SIGHUP that is ignored at
    the start, as under nohup, stays ignored.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        signal.signal(number, lambda number, frame: received.append(number))
    return lambda: bool(received)


def work_until_stopped(
    work: Callable[[], T], cancel: Callable[[], None], wait: Wait, stopped: Callable[[], bool]
) -> T:
    """Do `work` on a thread of its own while this one waits; `cancel` ends it from here.

    Raises KeyboardInterrupt when it was stopped before the work was done, and what `work` and
    `wait` raise.
    """
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            wait(lambda: working.done() or stopped())
        finally:
            cancel()  # does nothing to work that is done
        if stopped() and working.exception():
            raise KeyboardInterrupt
        return working.result()
