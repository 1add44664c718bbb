"""What an engine is to the comparison: a process tree inside a memory cgroup that gives tokens."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.peers.cgroup import MemoryGroup
from tests.stack import ROOT

THREADS = 2
STOP_S = 60.0


@dataclass(frozen=True)
class Token:
    """at_s: when it came, on time.monotonic."""

    token_id: int
    at_s: float


class Engine(Protocol):
    """One running engine."""

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        """Sampled at TEMPERATURE from the whole vocabulary, past any end of text."""
        ...


@dataclass(frozen=True)
class Setup:
    """What an engine is started with.

    python:      the peers' own environment
    folder:      where the model is, in every engine's format
    limit_bytes: of the cgroup; None: unlimited
    """

    python: Path
    folder: Path
    group: MemoryGroup
    limit_bytes: int | None
    log: Path


Start = Callable[[Setup], AbstractContextManager[Engine]]


@contextmanager
def process(setup: Setup, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """In the cgroup and a session of its own, for the block; what it leaves behind is killed."""
    with setup.log.open("w") as log:
        started = subprocess.Popen(
            setup.group.command(command),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        assert started.stdin and started.stdout
        started.stdin.close()
        started.stdout.close()


def first_line(started: subprocess.Popen[str], start: str, log: Path) -> str:
    """The first line of output that begins so. Raises OSError when the process ends before."""
    assert started.stdout
    for line in started.stdout:
        if line.startswith(start):
            return line.strip()
    raise OSError(f"it did not start: {log.read_text().strip()[-500:]}")


def end_input(started: subprocess.Popen[str]) -> None:
    """Closes standard input, and waits for the process to end of it."""
    assert started.stdin
    started.stdin.close()
    started.wait(STOP_S)
