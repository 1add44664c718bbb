"""Starts daemons, watches them, restarts those that died, stops them in reverse. One thread."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from deploy.stack import log_files
from deploy.stack.memory import MemorySampler
from deploy.stack.run_dir import RunDir
from proto import errors
from proto.process.daemon import START_ERROR, may_pass, refusal

_POLL_S = 0.05
_RESTARTS_ALLOWED = 5
_RESTART_WINDOW_S = 60.0
_GRACE_S = 25.0
_SAY_AFTER_S, _SAY_AGAIN_S = 2.0, 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")  # times, process ids, addresses: not what is said


def silent(line: str) -> None:
    """Drop the line."""


@dataclass
class Daemon:
    """One supervised process.

    presence: descriptor of the lock that it holds while it lives, see `RunDir.presence`
    activity: what takes long while it starts
    restarts: the times when it was started again
    has_served, is_away: whether it ever was ready; whether it is being started again
    failure: its last line when it last died before it ever was ready
    """

    name: str
    command: list[str]
    run: RunDir
    presence: int
    activity: str = ""
    process: subprocess.Popen[bytes] | None = None
    restarts: deque[float] = field(default_factory=deque)
    restart_at_s: float = 0.0
    has_served: bool = False
    is_away: bool = False
    failure: str = ""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None

    def start(self) -> None:
        with self.run.log(self.name).open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the launcher's: it stops them in order
                preexec_fn=partial(_die_with, os.getpid()),
                pass_fds=[self.presence],
            )

    def signal(self, number: int) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def is_ready(self) -> bool:
        """Whether its socket accepts."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.run.socket(self.name)))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def last_words(self) -> str:
        """The last line of its log: a daemon that refuses to start says why in one sentence."""
        return log_files.last_line(self.run.log(self.name))[-600:] or "it said nothing"

    def describe(self) -> str:
        return f"{self.name} ({self.activity})" if self.activity else self.name

    def how_it_died(self) -> str:
        assert self.process is not None
        status = self.process.returncode
        if status < 0:
            return f"by signal {-status}, {signal.strsignal(-status)}"
        return f"with status {status}: {self.last_words()}"

    def refusal(self) -> errors.FlashMoEError:
        """Why it cannot start: its own error, or StartFailed with its name and log when its own
        error does not say what a user can do.
        """
        found = refusal(self.last_words())
        if type(found) in (errors.FlashMoEError, errors.Unavailable, errors.StartFailed):
            where = self.run.log(self.name)
            return errors.StartFailed(f"{self.name} did not start: {found}: see {where}")
        return found


def _die_with(parent: int) -> None:
    """Have the kernel end this process, just forked, when the thread that forked it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


class Stack:
    """The daemons of one run directory.

    Used by the main thread alone: daemons end with the thread that started them.
    """

    def __init__(
        self,
        daemons: Sequence[Daemon],
        sampler: MemorySampler,
        say: Callable[[str], None] = silent,
    ) -> None:
        """daemons: in the order of start. say: called with a line whenever something happens"""
        self._sampler = sampler
        self._daemons = daemons
        self._say = say
        self._problem = ""

    def start(self, until: Callable[[], bool]) -> None:
        """Start everything and wait until it serves, or until `until` turns true.

        Raises the error of a daemon that refuses to start, Unavailable when one keeps dying.
        """
        self._say(f"starting {', '.join(daemon.describe() for daemon in self._daemons)}")
        for daemon in self._daemons:
            daemon.start()
        waiting, start_s = list(self._daemons), time.monotonic()
        said, said_s = waiting, start_s
        while waiting and not until():
            self.tick()
            waiting = [daemon for daemon in waiting if not daemon.has_served]
            silence_s = time.monotonic() - said_s
            if silence_s > (_SAY_AGAIN_S if waiting == said else _SAY_AFTER_S) and waiting:
                names = ", ".join(daemon.describe() for daemon in waiting)
                self._say(f"after {time.monotonic() - start_s:.0f} s, waiting for {names}")
                said, said_s = waiting, time.monotonic()
            time.sleep(_POLL_S)

    def watch(self, until: Callable[[], bool]) -> None:
        """Keep the daemons alive until `until` turns true. Raises as `start`."""
        while not until():
            self.tick()
            time.sleep(_POLL_S)

    def tick(self) -> None:
        """Restart daemons that died, bound the logs, see who is ready, and sample memory once."""
        for daemon in self._daemons:
            self._revive(daemon)
            log_files.bound(daemon.run.log(daemon.name))
            if not daemon.has_served or daemon.is_away:
                self._greet(daemon)
        pids = {d.name: d.pid for d in self._daemons if d.pid is not None}
        self._sampler.sample({**pids, "launcher": os.getpid()})
        self._say_problem()

    def write_memory(self) -> None:
        """Make the latest memory report readable now."""
        self._sampler.write()

    def stop(self) -> None:
        """SIGTERM in reverse order of start, each with time to finish its work."""
        for daemon in reversed(self._daemons):
            daemon.signal(signal.SIGTERM)
            if daemon.process is None or _has_ended(daemon.process, _SAY_AFTER_S):
                continue
            self._say(f"stopping: {daemon.name} finishes its work, {_GRACE_S:.0f} s at most")
            if not _has_ended(daemon.process, _GRACE_S - _SAY_AFTER_S):
                self._say(f"{daemon.name} did not stop in {_GRACE_S:.0f} s: killing it")
                daemon.signal(signal.SIGKILL)
                daemon.process.wait()

    def _greet(self, daemon: Daemon) -> None:
        if daemon.process is None or not daemon.is_ready():
            return
        if daemon.is_away:
            self._say(f"{daemon.name} is back")
        daemon.has_served, daemon.is_away = True, False

    def _say_problem(self) -> None:
        """Say once that the memory report cannot be written, and once that it can again."""
        if self._sampler.problem == self._problem:
            return
        failures = self._sampler.report.write_failures
        gone = f"the memory report is written again, after {failures} failures"
        self._say(self._sampler.problem or gone)
        self._problem = self._sampler.problem

    def _revive(self, daemon: Daemon) -> None:
        process, now = daemon.process, time.monotonic()
        if process is None:
            if now >= daemon.restart_at_s:
                self._start(daemon)
            return
        if process.poll() is None:
            return
        if process.returncode == START_ERROR or self._failed_alike(daemon):
            raise daemon.refusal()
        self._count_death(daemon, daemon.how_it_died())

    def _start(self, daemon: Daemon) -> None:
        try:
            daemon.start()
        except OSError as error:  # no room for its log, or for another process
            self._count_death(daemon, f"before it ran ({error.strerror})")

    def _count_death(self, daemon: Daemon, how: str) -> None:
        """Schedule a restart. Raises Unavailable when the daemon died too often."""
        now = time.monotonic()
        daemon.restarts.append(now)
        while daemon.restarts[0] < now - _RESTART_WINDOW_S:
            daemon.restarts.popleft()
        if len(daemon.restarts) > _RESTARTS_ALLOWED:
            raise errors.Unavailable(
                f"{daemon.name} died {len(daemon.restarts)} times in a minute, the last time "
                f"{how}: see {daemon.run.log(daemon.name)}"
            )
        self._say(f"{daemon.name} died {how}; starting it again")
        daemon.process, daemon.is_away = None, True
        daemon.restart_at_s = now + 0.1 * 2 ** (len(daemon.restarts) - 1)

    def _failed_alike(self, daemon: Daemon) -> bool:
        """Whether it ended by itself, twice with the same line, before it ever was ready: a third
        start would end alike. A death by a signal does not count, nor one of which the daemon says
        that trying again may help.
        """
        assert daemon.process is not None
        if daemon.has_served or daemon.process.returncode < 0 or may_pass(daemon.last_words()):
            return False
        before, daemon.failure = daemon.failure, _NUMBER.sub("#", daemon.last_words())
        return daemon.failure == before


def _has_ended(process: subprocess.Popen[bytes], wait_s: float) -> bool:
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        return False
    return True
