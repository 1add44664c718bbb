"""The stack of one box, as the box sees it: found by the locks of its run directory, adopted when
it lives, started when it does not.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from deploy.cluster import orphan
from deploy.cluster.order import SETTINGS_NAME, WORKERS_NAME, Order
from deploy.stack import leftovers, locks, log_files
from deploy.stack.run_dir import RunDir, RunState
from proto import errors

LAUNCHER = "launcher"  # whose log the stack's own words are in
_POLL_S = 0.05
_STOP_S = 90.0  # daemons finish their work one after the other


class BoxStack:
    """One process looks after a run directory; the stack in it lives longer.

    environment: of the processes that it starts
    """

    def __init__(self, run: RunDir, environment: Mapping[str, str]) -> None:
        self._run, self._environment = run, environment

    @property
    def state(self) -> RunState:
        return self._run.state()

    @property
    def launcher_pid(self) -> int | None:
        """Of the process that holds the run directory; None: none does."""
        if self._run.state() is RunState.ABSENT:
            return None
        found = (pid for pid in locks.holders(self._run.lock) if pid != os.getpid())
        return next(found, None)

    def last_words(self) -> str:
        """Of the launcher that ended: why."""
        said = log_files.last_line(self._run.log(LAUNCHER))
        return said.removeprefix("flashmoe: ") or "it said nothing"

    def bring_about(self, order: Order) -> int:
        """Have the stack of this order run: adopt one that lives, unless it has other settings and
        is stopped first. Returns the process id of its launcher. Does not wait until it serves.

        Raises ConfigInvalid, AlreadyRunning, OSError.
        """
        self._run.prepare()
        file, text = self._run.path / SETTINGS_NAME, order.settings_text()
        if order.verb == "serve":
            _replace(self._run.path / WORKERS_NAME, order.workers_text())
        is_same = file.exists() and file.read_text() == text
        lives = is_same and self.state in (RunState.STARTING, RunState.SERVING)
        if lives and (pid := self.launcher_pid) is not None:
            return pid
        self.stop()
        _replace(file, text)
        log_files.clear(self._run.log(LAUNCHER))
        command = [sys.executable, "-m", "deploy.cli", order.verb, "--config", str(file)]
        return orphan.start(self._run.log(LAUNCHER), command, self._environment)

    def stop(self) -> bool:
        """Have nothing of it run, and nothing of it left in shared memory. Returns whether
        something ran.

        Raises AlreadyRunning when it does not end.
        """
        deadline_s, has_run = time.monotonic() + _STOP_S, False
        while self._is_there():
            if (pid := self.launcher_pid) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                has_run = True
                wait_for_end(pid, deadline_s - time.monotonic())
            if time.monotonic() > deadline_s:
                raise errors.AlreadyRunning(
                    f"the stack in {self._run.path} did not stop in {_STOP_S:.0f} s: end the "
                    f"processes {', '.join(map(str, locks.holders(self._run.presence)))}"
                )
            time.sleep(_POLL_S)
        leftovers.sweep()
        return has_run

    def _is_there(self) -> bool:
        """The launcher, or daemons whose launcher was killed and that end by themselves."""
        return locks.is_held(self._run.lock) or locks.is_held(self._run.presence)


def wait_for_end(pid: int, timeout_s: float | None = None) -> bool:
    """Wait until the process, which need not be a child, has ended; whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ended, _, _ = select.select([descriptor], [], [], timeout_s and max(0.0, timeout_s))
    finally:
        os.close(descriptor)
    return bool(ended)


def _replace(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, never a part."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
