"""The journal of what is finished.

Planted faults seen red: a torn last line kept the rest from being read, another task's entries
taken over, a failed write tried again at close.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.offline.checkpoint.progress import Journal
from proto import errors
from tests.expert_store.conftest import SmallDisk

TASK = {"files": [["a", 1]]}


def done_in(path: Path, task: dict[str, object] = TASK) -> dict[str, int]:
    journal = Journal(path, task)
    journal.close()
    return journal.done


def write(path: Path, count: int) -> dict[str, int]:
    journal = Journal(path, TASK)
    for number in range(count):
        journal.add(f"L00E{number:03d}", number << 40)
    journal.flush()
    journal.close()
    return journal.done


def test_what_was_flushed_is_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", TASK)
    assert not journal.resumed
    journal.add("kept", 1)
    journal.flush()
    journal.add("lost", 2)
    journal.close()
    assert done_in(tmp_path / "journal") == {"kept": 1}
    assert done_in(tmp_path / "journal") == {"kept": 1}, "opening it forgets nothing"


def test_another_task_starts_over(tmp_path: Path) -> None:
    write(tmp_path / "journal", 3)
    assert done_in(tmp_path / "journal", {"files": [["a", 2]]}) == {}


@settings(deadline=None, max_examples=100)
@given(cut=st.integers(0, 200), tail=st.binary(max_size=20))
def test_a_torn_journal_promises_nothing_false(
    cut: int, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal"
    full = write(path, 5)
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole + b"\x00" + tail)
    found = done_in(path)
    lines = whole.count(b"\n")
    assert list(found.items()) == list(full.items())[: max(0, lines - 1)]


@pytest.mark.parametrize(
    "line", ['["a"]', "[1, 2]", '["a", "b"]', '["a", 1.5]', "{}", '[["a"], 1]']
)
def test_lines_of_another_shape_are_dropped(line: str, tmp_path: Path) -> None:
    write(tmp_path / "journal", 1)
    with (tmp_path / "journal").open("a") as file:
        file.write(line + "\n")
    assert list(done_in(tmp_path / "journal")) == ["L00E000"]


def test_a_full_disk_is_typed_and_closing_is_quiet(small_disk: SmallDisk) -> None:
    """Red with a buffered file: it writes again when closed, and raises where nobody expects it."""
    journal = Journal(small_disk.path / "journal", TASK)
    (small_disk.path / "filler").write_bytes(bytes(small_disk.free_bytes))
    for number in range(1000):
        journal.add(f"L00E{number:03d}", number)
    with pytest.raises(errors.ManifestInvalid, match="No space left"):
        journal.flush()
    journal.close()
    with pytest.raises(errors.ManifestInvalid, match="No space left"):
        Journal(small_disk.path / "journal", {"task": "x" * 10_000})


def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.ManifestInvalid, match="no-such"):
        Journal(tmp_path / "no-such" / "journal", TASK)


def test_entries_are_durable_before_flush_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write(tmp_path / "journal", 2)
    assert synced[-1] == (tmp_path / "journal").stat().st_size
