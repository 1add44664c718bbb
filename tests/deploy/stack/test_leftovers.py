"""What killed stacks left is found and removed, and nothing else is.

Planted faults seen red: a segment removed whose store, or whose launcher, lives; a scratch folder
removed before its launcher wrote its configuration; other users' files; links followed; a stack
that starts between the look and the removal.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.stack import leftovers, locks, run_dir
from deploy.stack.run_dir import RunDir
from deploy.verbs import doctor

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where segments are; scratch folders are in `tmp_path / "tmp"`."""
    for name in ("memory", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(run_dir, "SHARED_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "memory"


@contextmanager
def held(path: Path) -> Iterator[None]:
    descriptor = locks.hold(path)
    assert descriptor is not None
    yield
    os.close(descriptor)


def killed(path: Path) -> RunDir:
    """A stack's segment and both its locks, which nobody holds."""
    run = RunDir(path)
    run.segment.write_bytes(b"x" * SIZE)
    run.presence.touch()
    return run


def scratch(name: str = "flashmoe-ab12cd_8") -> RunDir:
    run = RunDir(Path(tempfile.gettempdir()) / name)
    run.path.mkdir()
    run.lock.touch()
    run.config.write_text("[expert_store]\n")
    return run


def test_what_a_killed_stack_left_is_removed(memory: Path, tmp_path: Path) -> None:
    segment, folder = killed(tmp_path / "run").segment, killed(scratch().path).path
    found = leftovers.find()
    assert {leftover.path for leftover in found if leftover.size_bytes} >= {segment, folder}
    assert sum(leftover.size_bytes for leftover in found) >= 2 * SIZE
    assert {leftover.path for leftover in leftovers.sweep()} >= {segment, folder}
    assert list(memory.iterdir()) == [] and not folder.exists()
    assert leftovers.sweep() == []


def test_a_lock_without_a_segment_goes_without_a_word(memory: Path, tmp_path: Path) -> None:
    RunDir(tmp_path).presence.touch()
    assert leftovers.sweep() == [] and list(memory.iterdir()) == []


def test_what_somebody_alive_holds_stays(tmp_path: Path) -> None:
    run, folder = killed(tmp_path / "run"), scratch()
    for lock in (run.presence, run.segment):
        with held(lock), held(folder.lock):
            assert leftovers.find() == [] == leftovers.sweep()
    killed(folder.path)
    with held(folder.presence), held(run.presence):  # its daemons live, its launcher does not
        assert leftovers.sweep() == []
    assert run.segment.exists() and folder.segment.exists() and folder.path.exists()


def test_what_is_not_a_stacks_stays(memory: Path, tmp_path: Path) -> None:
    others = [memory / "flashmoe-test-x", memory / "flashmoe", memory / "ab12cd34ef56"]
    for file in others:
        file.write_bytes(b"x")
    (memory / "flashmoe-0123456789ab").symlink_to(others[0])
    for name in ("flashmoe-engine", "flashmoe-calibrate-ab12cd_8"):
        others.append(scratch(name).path)
    starting = RunDir(tmp_path / "tmp" / "flashmoe-starting")  # its launcher has not come so far
    starting.path.mkdir()
    starting.lock.touch()
    (tmp_path / "tmp" / "flashmoe-ab12cd34").symlink_to(scratch("precious").path)
    assert leftovers.find() == [] == leftovers.sweep()
    assert all(path.exists() for path in (*others, starting.path, tmp_path / "tmp/precious"))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another user takes root")
def test_another_users_stays(tmp_path: Path) -> None:
    run, folder = killed(tmp_path / "run"), scratch()
    os.chown(run.segment, 12345, 12345)
    os.chown(run.presence, 12345, 12345)
    os.chown(folder.path, 12345, 12345)
    assert leftovers.find() == [] == leftovers.sweep()


def test_a_stack_that_starts_meanwhile_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed(tmp_path / "run")
    seen = leftovers.find()
    monkeypatch.setattr(leftovers, "find", lambda: seen)
    with held(run.presence):
        assert leftovers.sweep() == [] and run.segment.exists()


def test_without_the_folders_there_is_nothing(memory: Path) -> None:
    shutil.rmtree(memory)
    assert leftovers.sweep() == []


def test_doctor_lists_it(tmp_path: Path) -> None:
    assert not doctor.check_leftovers().remedy
    run = killed(tmp_path / "run")
    finding = doctor.check_leftovers()
    assert str(run.segment) in finding.fact and "1.0 MiB" in finding.fact and finding.remedy
    assert run.segment.exists()
