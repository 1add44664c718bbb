"""How a daemon ends: with its status and its last words, or with what it was doing.

Planted faults seen red: leaving without flushing, leaving by the interpreter's own way, also after
a defect, no fault handler; a refusal that is not held, is held for good, or is read as the next
start's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proto import daemon, errors
from tests.stack import ROOT, wait_for

OWN_WAY = "the interpreter took its own way out"
DAEMON = """
import atexit, os, signal, sys
from proto import daemon

class Config:
    log_level = "INFO"

async def run(config):
    print("the last words")
    {ending}

atexit.register(print, {own_way!r}, file=sys.stderr)
sys.argv = ["d", "--config", "none"]
daemon.leave(daemon.main("d", "", lambda path: Config(), run))
"""


def ended(ending: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What becomes of a daemon whose work ends so. It prints to a pipe, and so to a buffer."""
    script = folder / "script.py"
    script.write_text(DAEMON.format(ending=ending, own_way=OWN_WAY))
    return subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("ending", "status", "told"), [("pass", 0, ""), ("1 / 0", 1, "ZeroDivisionError")]
)
def test_leaves_with_its_status_and_what_it_said(
    ending: str, status: int, told: str, tmp_path: Path
) -> None:
    found = ended(ending, tmp_path)
    assert (found.returncode, found.stdout) == (status, "the last words\n")
    assert told in found.stderr and OWN_WAY not in found.stderr


def test_leaves_also_when_nobody_hears_its_last_words(tmp_path: Path) -> None:
    assert ended("os.close(1)", tmp_path).returncode == 0


def test_an_aborted_daemon_tells_what_it_was_doing(tmp_path: Path) -> None:
    found = ended("os.kill(os.getpid(), signal.SIGABRT)", tmp_path)
    assert found.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in found.stderr
    assert "in run" in found.stderr


REFUSAL = """
import sys
from pathlib import Path
from proto import daemon, errors

def load(path):
    if Path(sys.argv[4]).exists():
        raise errors.ConfigInvalid("the file of an earlier refusal is still there")
    raise errors.{kind}("no")

sys.argv = ["d", "--config", "none", "--hold", {file!r}]
daemon.leave(daemon.main("d", "", load, None))
"""


def refusing(kind: str, file: Path) -> subprocess.Popen[str]:
    """A daemon whose start fails with such an error."""
    script = file.with_suffix(".py")
    script.write_text(REFUSAL.format(kind=kind, file=str(file)))
    return subprocess.Popen(
        [sys.executable, script],
        env={"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_refusal_is_held_until_its_file_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "d.refused"
    file.write_text("of an earlier start")
    process = refusing("ConfigInvalid", file)
    try:
        wait_for(lambda: file.exists() and file.read_text().endswith("]\n"), 60, "the refusal")
        refusal = daemon.refusal(file.read_text().strip())
        assert (type(refusal), str(refusal)) == (errors.ConfigInvalid, "no")
        assert process.poll() is None
        file.unlink()
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (2, "d: no [ConfigInvalid]\n")
    finally:
        process.kill()


def test_what_may_pass_is_not_held(tmp_path: Path) -> None:
    process = refusing("StoreUnavailable", tmp_path / "d.refused")
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (1, "d: no [StoreUnavailable]\n")
    assert not (tmp_path / "d.refused").exists()
