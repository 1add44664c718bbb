"""Starts daemons, watches them, starts again what died, stops them in reverse. One thread."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from deploy import log_files
from deploy.memory import MemorySampler
from deploy.run_dir import RunDir
from proto import errors
from proto.daemon import START_ERROR, refusal

_POLL_S = 0.05
_RESTARTS_ALLOWED = 5
_RESTART_WINDOW_S = 60.0
_GRACE_S = 25.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass
class Daemon:
    """One supervised process. restarts: when it was started again."""

    name: str
    command: list[str]
    run: RunDir
    process: subprocess.Popen[bytes] | None = None
    restarts: deque[float] = field(default_factory=deque)
    restart_at_s: float = 0.0

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
                preexec_fn=_die_with_parent,
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


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Stack:
    """The daemons of one run directory."""

    def __init__(
        self, run: RunDir, commands: Mapping[str, list[str]], sampler: MemorySampler
    ) -> None:
        """commands: by daemon, in the order of start."""
        self._sampler = sampler
        self._daemons = [Daemon(name, command, run) for name, command in commands.items()]

    def start(self, until: Callable[[], bool]) -> None:
        """Start everything and wait until it serves, or until told to stop.

        Raises what a daemon says that refuses to start, Unavailable when one keeps dying.
        """
        for daemon in self._daemons:
            daemon.start()
        waiting = list(self._daemons)
        while waiting and not until():
            self.tick()
            waiting = [daemon for daemon in waiting if not daemon.is_ready()]
            time.sleep(_POLL_S)

    def watch(self, until: Callable[[], bool]) -> None:
        """Keep the daemons alive until told otherwise. Raises Unavailable when one keeps dying."""
        while not until():
            self.tick()
            time.sleep(_POLL_S)

    def tick(self) -> None:
        """Restart what died, bound the logs, sample memory once."""
        for daemon in self._daemons:
            self._revive(daemon)
            log_files.bound(daemon.run.log(daemon.name))
        pids = {d.name: d.pid for d in self._daemons if d.pid is not None}
        self._sampler.sample({**pids, "launcher": os.getpid()})

    def write_memory(self) -> None:
        """Make the latest memory report readable now."""
        self._sampler.write()

    def stop(self) -> None:
        """SIGTERM in reverse order of start, each with time to finish its work."""
        for daemon in reversed(self._daemons):
            daemon.signal(signal.SIGTERM)
            if daemon.process is not None:
                try:
                    daemon.process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    daemon.signal(signal.SIGKILL)
                    daemon.process.wait()

    def _revive(self, daemon: Daemon) -> None:
        process, now = daemon.process, time.monotonic()
        if process is None:
            if now >= daemon.restart_at_s:
                daemon.start()
            return
        if process.poll() is None:
            return
        if process.returncode == START_ERROR:
            raise refusal(daemon.last_words())
        daemon.restarts.append(now)
        while daemon.restarts[0] < now - _RESTART_WINDOW_S:
            daemon.restarts.popleft()
        if len(daemon.restarts) > _RESTARTS_ALLOWED:
            raise errors.Unavailable(
                f"{daemon.name} died {len(daemon.restarts)} times in a minute, the last time with "
                f"status {process.returncode}: see {daemon.run.log(daemon.name)}"
            )
        daemon.process = None
        daemon.restart_at_s = now + 0.1 * 2 ** (len(daemon.restarts) - 1)
