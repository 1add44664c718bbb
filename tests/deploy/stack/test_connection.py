"""What the run directory tells of a daemon that does not answer.

Faults seen red: after all daemons were killed, `generate` printed gRPC's own words; while a stack
was stopping, it told to start one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy import cli
from deploy.stack.connection import Absence, explain_absence, find_absence
from deploy.stack.run_dir import RunDir, RunState

NODE = "compute_node"


def listening(run: RunDir) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(run.socket(NODE)))
    server.listen()
    return server


def left_over(run: RunDir) -> None:
    """A socket of a daemon that was killed."""
    listening(run).close()


def nothing(run: RunDir) -> None:
    """No socket."""


@pytest.mark.parametrize(
    ("leave", "told", "absence"),
    [
        (nothing, None, Absence.NO_STACK),
        (nothing, RunState.STARTING, Absence.STARTING),
        (nothing, RunState.STOPPING, Absence.STOPPING),
        (nothing, RunState.SERVING, Absence.DIED),
        (left_over, None, Absence.KILLED),
        (left_over, RunState.SERVING, Absence.DIED),
    ],
)
def test_each_state_is_told_from_the_others(
    leave: Callable[[RunDir], None],
    told: RunState | None,
    absence: Absence,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """told: by a launcher that lives; None: there is none"""
    run = RunDir(run_dir.resolve())
    leave(run)
    with ExitStack() as stack:
        if told:
            stack.enter_context(run.claimed()).publish(told)
        assert find_absence(run, NODE) is absence
        assert cli.run(["generate", "hi", "--run-dir", str(run_dir)]) == 4
        said = capsys.readouterr().err
        assert said == f"flashmoe: {explain_absence(run, absence)}\n"
        assert ("start one" in said) is (absence is Absence.NO_STACK)
        assert cli.run(["status", "--run-dir", str(run_dir)]) == 4
        assert f"away: {absence.value}" in capsys.readouterr().out


def test_one_that_listens_is_there(run_dir: Path) -> None:
    run = RunDir(run_dir)
    with listening(run):
        assert find_absence(run, NODE) is Absence.SILENT


def test_a_run_directory_that_cannot_be_one_has_no_stack(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 200), Path("/dev/null")):
        assert find_absence(RunDir(path), NODE) is Absence.NO_STACK
