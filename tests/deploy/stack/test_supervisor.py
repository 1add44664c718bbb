"""Daemons that do not start, start late, or die: what is tried again, and what is said.

Planted faults seen red: six tries whatever it says, a number in its words taken for another
sentence, a signal taken for a refusal, a retry's words taken from a daemon that once served.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.stack import locks, supervisor
from deploy.stack.memory import MemorySampler
from deploy.stack.run_dir import RunDir
from deploy.stack.supervisor import Daemon, Stack
from proto import errors
from tests.stack import wait_for

# A daemon in little: what it does depends on how often it was started before.
SCRIPT = """
import os, signal, socket, sys, time
path = sys.argv[1]
with open(path + ".starts", "a+") as file:
    file.write("x")
    file.seek(0)
    start = len(file.read())

def refuse(words, status=1):
    print(words, file=sys.stderr)
    sys.exit(status)

def serve():
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", file=sys.stderr, flush=True)
    signal.pause()

{body}
"""
FEW_STARTS_S = 20


class Small:
    """A stack of one small daemon, and what was said."""

    def __init__(self, path: Path, body: str) -> None:
        self.run = RunDir(path)
        self.said: list[str] = []
        presence = locks.hold(self.run.path / "presence")
        assert presence is not None
        self.presence = presence
        command = [sys.executable, "-S", "-c", SCRIPT.format(body=body)]
        command.append(str(self.run.socket("scheduler")))
        self.daemon = Daemon("scheduler", command, self.run, presence, "thinking")
        self.sampler = MemorySampler(path, 0, 0, 0)
        self.stack = Stack([self.daemon], self.sampler, self.said.append)

    def start(self) -> None:
        deadline_s = time.monotonic() + FEW_STARTS_S
        self.stack.start(lambda: time.monotonic() > deadline_s)

    @property
    def num_starts(self) -> int:
        return len((self.run.path / "scheduler.sock.starts").read_text())

    def until_said(self, words: str) -> None:
        def said() -> bool:
            self.stack.tick()
            return any(words in line for line in self.said)

        wait_for(said, FEW_STARTS_S, words)


@contextmanager
def small(path: Path, body: str) -> Iterator[Small]:
    made = Small(path, body)
    try:
        yield made
    finally:
        made.stack.stop()
        os.close(made.presence)


def test_the_same_words_twice_end_the_start(run_dir: Path) -> None:
    """Red before: six tries in half a minute, `died 6 times in a minute, see LOG`, and 4."""
    body = "refuse(f'ValueError: no such kind of layer, in process {os.getpid()} at {id(path):#x}')"
    with small(run_dir, body) as made:
        with pytest.raises(errors.StartFailed) as raised:
            made.start()
        assert made.num_starts == 2
        assert "scheduler did not start: ValueError: no such kind of layer" in str(raised.value)
        assert "scheduler.log" in str(raised.value)
        assert any("no such kind of layer" in line for line in made.said)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("scheduler: this cannot be served [CheckpointUnsupported]", errors.CheckpointUnsupported),
        ("scheduler: it lacks a library [StartFailed]", errors.StartFailed),
        ("usage: scheduler --config FILE", errors.StartFailed),
        ("", errors.StartFailed),
    ],
)
def test_a_start_that_cannot_succeed_is_not_tried_again(
    words: str, kind: type[Exception], run_dir: Path
) -> None:
    """Red before for words of no kind: Unavailable, which asks to try again later."""
    with small(run_dir, f"refuse({words!r}, 2)") as made:
        with pytest.raises(errors.FlashMoEError) as raised:
            made.start()
        assert type(raised.value) is kind
        named = str(raised.value).startswith("scheduler did not start: ")
        assert named == (kind is errors.StartFailed)
        assert made.num_starts == 1


def test_other_words_and_signals_may_pass(run_dir: Path) -> None:
    body = """
if start < 3:
    os.kill(os.getpid(), signal.SIGKILL)
refuse("no room") if start == 3 else refuse("no memory") if start == 4 else serve()
"""
    with small(run_dir, body) as made:
        made.start()
        assert made.num_starts == 5
        assert made.said[0] == "starting scheduler (thinking)"
        died = [line for line in made.said if "died" in line]
        assert died == [
            "scheduler died by signal 9, Killed; starting it again",
            "scheduler died by signal 9, Killed; starting it again",
            "scheduler died with status 1: no room; starting it again",
            "scheduler died with status 1: no memory; starting it again",
        ]


def test_one_that_served_is_started_again_whatever_it_says(run_dir: Path) -> None:
    body = "serve() if start in (1, 4) else refuse('the disk is away')"
    with small(run_dir, body) as made:
        made.start()
        made.daemon.signal(signal.SIGKILL)
        made.until_said("scheduler is back")
        assert made.num_starts == 4
        assert made.said.count("scheduler is back") == 1


def test_waiting_is_told_once_in_a_while(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_SAY_AGAIN_S", 0.1)
    with small(run_dir, "time.sleep(0.5); serve()") as made:
        made.start()
        waiting = [line for line in made.said if line.endswith("waiting for scheduler (thinking)")]
        assert 2 <= len(waiting) <= 20


def test_a_slow_stop_is_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_SAY_AFTER_S", 0.1)
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.2)
    with small(run_dir, "signal.signal(signal.SIGTERM, signal.SIG_IGN); serve()") as made:
        made.start()
    finishing, killing = made.said[-2:]
    assert finishing.startswith("stopping: scheduler finishes its work")
    assert killing.startswith("scheduler did not stop")


def test_daemons_hold_the_presence_of_their_stack(run_dir: Path) -> None:
    """Red when they do not inherit it: who sweeps would take the segment from under them."""
    with small(run_dir, "serve()") as made:
        made.start()
        assert len(locks.holders(run_dir / "presence")) == 2
        assert made.daemon.pid in locks.holders(run_dir / "presence")


def test_a_report_that_cannot_be_written_is_told_once(run_dir: Path) -> None:
    with small(run_dir, "serve()") as made:
        made.start()
        made.sampler.problem, made.sampler.report.write_failures = "it cannot be written", 7
        made.stack._say_problem()
        made.stack._say_problem()
        assert made.said.count("it cannot be written") == 1
        made.sampler.problem = ""
        made.stack._say_problem()
        assert made.said[-1] == "the memory report is written again, after 7 failures"
