"""What is done on this machine without asking Ray: Ray itself is started and stopped for
`ray = local`, and the stack of a box that Ray does not reach is ended.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from deploy.cluster import orphan
from deploy.cluster.box import Box
from deploy.cluster.box_stack import BoxStack, wait_for_end
from deploy.cluster.config import ClusterConfig
from deploy.cluster.ray_start import LOCK_NAME
from deploy.stack import locks, log_files
from deploy.stack.run_dir import RunDir
from proto import errors

_START_S, _STOP_S, _POLL_S = 120.0, 60.0, 0.1


def start(config: ClusterConfig, file: Path, say: Callable[[str], None]) -> None:
    """Have Ray run here: a head, and a raylet for every further address. Waits for the head.

    Raises StartFailed with the head's last words, OSError, CalledProcessError.
    """
    for folder, arguments in _parts(config, file):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not locks.is_held(folder / LOCK_NAME):
            say(f"starting Ray: flashmoe {' '.join(arguments)}")
            log_files.clear(folder / "ray.log")
            words = [sys.executable, "-m", "deploy.cli", *arguments]
            pid = orphan.start(folder / "ray.log", words, os.environ)
            if arguments[1] == "head":
                _wait_for_head(config, pid, folder / "ray.log")


def stop(config: ClusterConfig) -> None:
    """End what `start` started; the head last. Raises AlreadyRunning when it does not end."""
    for folder, _ in reversed(list(_parts(config, Path()))):
        lock = folder / LOCK_NAME
        deadline_s = time.monotonic() + _STOP_S
        while locks.is_held(lock):
            for pid in locks.holders(lock):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                wait_for_end(pid, _STOP_S)
            if time.monotonic() > deadline_s:
                raise errors.AlreadyRunning(f"Ray does not stop here: {lock} is held")


def stop_box(box: Box) -> bool:
    """End the stack that runs for the box on this machine. Returns whether one ran. Raises
    AlreadyRunning when it does not end.
    """
    run = RunDir(box.folder.expanduser().resolve())
    return run.path.is_dir() and BoxStack(run, os.environ).stop()


def _parts(config: ClusterConfig, file: Path) -> Iterator[tuple[Path, list[str]]]:
    """Where each part of Ray has its lock and log, and the command that it is started with."""
    where = str(file.resolve())
    yield config.head.state_dir.expanduser(), ["cluster", "head", where]
    seen = {config.head_box.host}
    for box in config.boxes:
        if box.host not in seen:
            seen.add(box.host)
            yield box.folder.expanduser(), ["cluster", "join", where, "--box", box.name]


def _wait_for_head(config: ClusterConfig, pid: int, log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        with suppress(OSError):
            socket.create_connection((config.head_box.host, config.head_port), 1.0).close()
            return
        if wait_for_end(pid, _POLL_S) or time.monotonic() > deadline_s:
            raise errors.StartFailed(f"Ray did not start: {log_files.last_line(log)}: see {log}")
