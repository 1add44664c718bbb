"""How a daemon ends: with its status and its last words, or with what it was doing.

Planted faults seen red: leaving without flushing, leaving by the interpreter's own way, no fault
handler.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.stack import ROOT

LEAVE = """
import atexit, sys
from proto import daemon
atexit.register(print, "the interpreter took its own way out", file=sys.stderr)
print("the last words")
daemon.leave(3)
"""

DAEMON = """
import os, signal, sys
from proto import daemon

class Config:
    log_level = "INFO"

async def run(config):
    os.kill(os.getpid(), signal.SIGABRT)

sys.argv = ["d", "--config", "none"]
daemon.leave(daemon.main("d", "", lambda path: Config(), run))
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_leaves_with_its_status_and_what_it_said(tmp_path: Path) -> None:
    """Printed to a pipe, so that it waits in a buffer."""
    ended = python(LEAVE, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "the last words\n", "")


def test_an_aborted_daemon_tells_what_it_was_doing(tmp_path: Path) -> None:
    ended = python(DAEMON, tmp_path)
    assert ended.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in ended.stderr
    assert "in run" in ended.stderr
