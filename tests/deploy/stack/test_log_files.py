"""Logs keep within a limit, whoever writes them.

Planted faults seen red: a file renamed under its writer (it goes on growing), nothing kept, last
words looked for in the new file alone, a disk without room that leaves the log as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.stack import log_files

LIMIT_BYTES = 1000


def test_a_writer_goes_on_in_a_log_that_began_anew(tmp_path: Path) -> None:
    log = tmp_path / "compute_node.log"
    with log.open("ab", buffering=0) as writer:  # as the launcher opens it for a daemon
        for number in range(1000):
            writer.write(b"line %04d of a library in C\n" % number)
            log_files.bound(log, LIMIT_BYTES)
            assert log.stat().st_size <= LIMIT_BYTES
    lines = log_files.older(log).read_text() + log.read_text()
    assert lines.endswith("line 0999 of a library in C\n")
    assert len(lines.splitlines()) > LIMIT_BYTES // 28, "older lines are kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compute_node.log", "compute_node.log.1"]


def test_last_words_are_found_in_the_older_part(tmp_path: Path) -> None:
    log = tmp_path / "scheduler.log"
    assert log_files.last_line(log) == ""
    log.write_text("x" * LIMIT_BYTES + "\nscheduler: no room [ConfigInvalid]\n")
    log_files.bound(log, LIMIT_BYTES)
    assert log.read_text() == ""
    assert log_files.last_line(log) == "scheduler: no room [ConfigInvalid]"
    log_files.clear(log)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_bounds_the_log_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(source: Path, target: Path) -> None:
        target.write_text("part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_room)
    log = tmp_path / "expert_store.log"
    log.write_text("x" * 2 * LIMIT_BYTES)
    log_files.bound(log, LIMIT_BYTES)
    assert log.read_text() == log_files.NO_ROOM
    assert not log_files.older(log).exists()
