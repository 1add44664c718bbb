"""A launcher that is killed leaves nothing in the way of the next one.

Planted faults seen red: no wait for the daemons of the one before (`another daemon answers`), no
sweep at start (the segment and the folder stay for ever).
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.stack.run_dir import RunDir
from tests.stack import FLASHMOE, ROOT, served, stop_hard, wait_for

pytestmark = pytest.mark.system


def test_the_next_serve_waits_for_daemons_that_still_run(tiny_store: Path, run_dir: Path) -> None:
    """A node that is finishing an answer, say; here one that is held up."""
    with served(tiny_store, run_dir) as stack:
        node = stack.pid("compute_node")
        os.kill(node, signal.SIGSTOP)
        os.kill(stack.process.pid, signal.SIGKILL)
        flags = ["--model", str(tiny_store), "--experts-memory", "96", "--run-dir", str(run_dir)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([*FLASHMOE, "serve", *flags], cwd=ROOT, text=True, **pipes) as second:
            assert second.stdout and second.stderr
            first_line = second.stderr.readline()
            os.kill(node, signal.SIGCONT)
            try:
                assert "waiting until its daemons have stopped" in first_line
                assert second.stdout.readline().startswith("ready: ")
            finally:
                stop_hard(second)


def test_the_next_run_removes_what_a_killed_one_left(tiny_store: Path, run_dir: Path) -> None:
    """The store is killed too, as by a kernel without memory: nobody removes the segment."""
    command = [*FLASHMOE, "run", "x", "--model", str(tiny_store), "--experts-memory", "96"]
    options: dict[str, Any] = {
        "cwd": ROOT,
        "env": os.environ | {"TMPDIR": str(run_dir.resolve())},
        "stdout": subprocess.DEVNULL,
    }
    killed = subprocess.Popen([*command, "--max-tokens", "2000"], **options)
    folder: Path = wait_for(
        lambda: next(run_dir.resolve().glob("flashmoe-*/expert_store.sock"), None), 60, "a store"
    ).parent
    processes = psutil.Process(killed.pid).children()
    os.kill(killed.pid, signal.SIGKILL)
    for process in processes:
        process.kill()
    killed.wait()
    psutil.wait_procs(processes, 20)
    segment = RunDir(folder).segment
    assert segment.exists() and folder.exists()
    done = subprocess.run([*command, "--max-tokens", "1"], **options, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert f"killed stacks left: {segment}, {folder}" in done.stderr.decode()
    assert not segment.exists() and list(run_dir.iterdir()) == []
