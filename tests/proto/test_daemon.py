"""How a daemon ends: with its status and its last words, or with what it was doing.

Planted faults seen red: leaving without flushing, leaving by the interpreter's own way, also after
a defect, no fault handler.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from proto import daemon
from tests.expert_store.conftest import SmallDisk, small_disk  # noqa: F401  a fixture
from tests.stack import ROOT

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


def test_a_full_disk_does_not_keep_a_daemon_from_its_metrics(
    small_disk: SmallDisk,  # noqa: F811
) -> None:
    """Red before: OSError, so that a daemon that died could not start again."""
    file = small_disk.path / "d.metrics"
    with daemon.serving_metrics(CollectorRegistry(), 0, file) as port:
        assert file.read_text() == f"{port}\n"
    (small_disk.path / "ballast").write_bytes(b"x" * small_disk.free_bytes)
    with daemon.serving_metrics(CollectorRegistry(), 0, file) as port:
        assert port
        assert [path.name for path in small_disk.path.iterdir()] == ["ballast"], "no stale port"
