"""Whether somebody alive holds a file is the kernel's word, and looking takes nothing from anybody.

Planted faults seen red: no second look after the lock is had (a removed file is claimed), no wait
for who only looks, a pipe opened and waited for, a process left out for one file that it closed.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.stack import locks


def test_one_holds_it_and_the_others_see_that(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held(path) and not path.exists(), "looking makes nothing"
    first = locks.hold(path)
    assert first is not None and locks.is_held(path) and locks.hold(path) is None
    assert locks.holders(path) == [os.getpid()]
    os.close(first)
    assert not locks.is_held(path) and locks.holders(path) == []


def test_a_file_closed_meanwhile_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread of the process opens and closes files."""
    path, readlink = tmp_path / "lock", os.readlink

    def and_closed(link: Path) -> str:
        if readlink(link) != str(path):
            raise FileNotFoundError(link)
        return readlink(link)

    descriptor = locks.hold(path)
    assert descriptor is not None
    monkeypatch.setattr(locks.os, "readlink", and_closed)
    assert locks.holders(path) == [os.getpid()]
    os.close(descriptor)


def test_a_child_that_inherits_it_holds_it_too(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    descriptor = locks.hold(path)
    assert descriptor is not None
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[descriptor])
    os.close(descriptor)
    assert locks.is_held(path)
    child.kill()
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert not locks.is_held(path)


def test_who_only_looks_keeps_nobody_from_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [looking]).start()
    descriptor = locks.hold(path, locks.LOOK_S)
    assert descriptor is not None
    os.close(descriptor)


def test_a_file_removed_by_its_holder_is_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "lock", fcntl.flock

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    descriptor = locks.hold(path, 1.0)
    assert descriptor is not None and locks.is_held(path)
    os.close(descriptor)


def test_what_stands_in_its_place_is_not_followed_or_waited_for(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        locks.hold(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()
    os.mkfifo(tmp_path / "pipe")
    assert not locks.is_held(tmp_path / "pipe")
