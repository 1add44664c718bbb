"""How a daemon ends: with its status and its last words, or with what it was doing.

Planted faults seen red: leaving without flushing, leaving by the interpreter's own way, also after
a defect, no fault handler, a start's defect or lasting OSError tried again, a passing one given up,
a message of several lines or of thousands of characters as last words, a served daemon's defect
taken for a failed start, libraries imported before anybody listens for their errors, counts of the
log after the last words; a refusal that is not held, is held for good, or is read as the next
start's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from proto import errors
from proto.process import daemon
from tests.expert_store.conftest import SmallDisk, small_disk  # noqa: F401  a fixture
from tests.stack import ROOT, wait_for

OWN_WAY = "the interpreter took its own way out"
DAEMON = """
import atexit, errno, logging, os, signal, sys
from proto.process import daemon
from proto import errors, rpc

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
    ("ending", "status", "told"), [("pass", 0, ""), ("1 / 0", 2, "ZeroDivisionError")]
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


def last_words(found: subprocess.CompletedProcess[str]) -> errors.FlashMoEError:
    """As the launcher reads them."""
    return daemon.refusal(found.stderr.splitlines()[-1][-600:])


@pytest.mark.parametrize(
    ("error", "status", "kind", "told"),
    [
        ("ValueError('rope of\\nan unknown kind')", 2, "StartFailed", "rope of an unknown kind"),
        ("RuntimeError('x' * 5000 + ': update it')", 2, "StartFailed", ": update it"),
        ("ImportError('needs sentencepiece')", 2, "StartFailed", "needs sentencepiece"),
        ("OSError('no tokenizer there')", 2, "StartFailed", "no tokenizer there"),
        ("PermissionError(errno.EACCES, 'Denied', 'w.bin')", 2, "StartFailed", "w.bin"),
        ("MemoryError()", 2, "MemoryExceeded", "lower --memory"),
        ("OSError(errno.EMFILE, 'Too many open files')", 1, "Unavailable", "Too many open files"),
        ("ConnectionResetError(errno.ECONNRESET, 'Reset')", 1, "Unavailable", "Reset"),
        ("errors.Unavailable('no store yet')", 1, "Unavailable", "no store yet"),
        ("errors.ConfigInvalid('a\\nb' * 999 + ': change it')", 2, "ConfigInvalid", ": change it"),
    ],
)
def test_a_start_is_tried_again_only_where_that_may_help(
    error: str, status: int, kind: str, told: str, tmp_path: Path
) -> None:
    found = ended(f"raise {error}", tmp_path)
    problem = last_words(found)
    assert (found.returncode, type(problem).__name__) == (status, kind)
    assert told in str(problem)
    assert ("Traceback" in found.stderr) == (not error.startswith("errors."))


def test_who_has_served_is_started_again(tmp_path: Path, run_dir: Path) -> None:
    """A defect that one request met may spare the next."""
    serving = f'rpc.serving(rpc.Listen("unix:{run_dir}/s"), lambda server: None, [], 1.0)'
    found = ended(f"async with {serving}: 1 / 0", tmp_path)
    assert found.returncode == 1
    assert isinstance(last_words(found), errors.Unavailable)
    assert "ZeroDivisionError" in str(last_words(found))


def test_the_last_words_come_last(tmp_path: Path) -> None:
    flood = "for _ in range(99): logging.getLogger().warning('flood')"
    found = ended(f"{flood}\n    raise errors.ConfigInvalid('change it')", tmp_path)
    assert "lines left out" in found.stderr
    assert str(last_words(found)) == "change it"


@pytest.mark.parametrize("name", ["expert_store", "compute_node", "scheduler"])
def test_a_library_that_cannot_be_loaded_is_not_tried_again(name: str, tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("raise ImportError('libstdc++.so.6: too old')")
    found = subprocess.run(
        [sys.executable, "-m", name, "--config", "none"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    problem = last_words(found)
    assert (found.returncode, type(problem)) == (2, errors.StartFailed)
    assert "libstdc++.so.6: too old" in str(problem) and "Traceback" in found.stderr


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


REFUSAL = """
import sys
from pathlib import Path
from proto.process import daemon
from proto import errors

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
