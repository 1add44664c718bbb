from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.daemon import snapshot
from scheduler.daemon.snapshot import SnapshotFile, SnapshotInvalid
from scheduler.learn.learner import ReuseModel
from tests.expert_store.conftest import SmallDisk, small_disk  # noqa: F401  a fixture
from tests.scheduler.learn.test_learner import NAMES, taught

FINGERPRINT = "f00d"


def file_at(path: Path | None, interval_s: float = 30.0) -> SnapshotFile:
    return SnapshotFile(path, FINGERPRINT, interval_s)


async def test_a_restored_learner_scores_alike(tmp_path: Path) -> None:
    """Red when any weight, moment or counter is left out."""
    path = tmp_path / "new" / "learner.npz"
    model, copy = taught(), ReuseModel(NAMES)
    await file_at(path).save(model)
    file_at(path).restore(copy)
    table = np.random.default_rng(1).normal(0, 300, (len(NAMES), 4, 5))
    np.testing.assert_array_equal(copy.predict(table), model.predict(table))
    for name, value in vars(model.state()).items():
        np.testing.assert_array_equal(getattr(copy.state(), name), value)
    assert [entry.name for entry in path.parent.iterdir()] == ["learner.npz"]


DATA = snapshot.encode(FINGERPRINT, taught(2).state())


@given(at=st.integers(0, len(DATA) - 1), flip=st.integers(1, 255))
def test_any_damaged_byte_is_noticed(at: int, flip: int) -> None:
    """Red without the checksum."""
    damaged = bytearray(DATA)
    damaged[at] ^= flip
    with pytest.raises(SnapshotInvalid, match="checksum"):
        snapshot.decode(bytes(damaged), FINGERPRINT, NAMES)


@given(st.binary(max_size=200) | st.integers(0, len(DATA) - 1).map(lambda size: DATA[:size]))
def test_garbage_and_stumps_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotInvalid):
        snapshot.decode(data, FINGERPRINT, NAMES)


def resealed(**changes: Any) -> bytes:
    """A snapshot whose checksum is right and whose content is not."""
    with np.load(io.BytesIO(DATA[:-32])) as archive:
        arrays = {**archive, **changes}
    body = io.BytesIO()
    np.savez(body, **arrays)
    return body.getvalue() + snapshot.hashlib.sha256(body.getvalue()).digest()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other"}, "of the model other"),
        ({"format": 99}, "another format"),
        ({"names": np.array(["a", "b", "c"])}, "other features"),
        ({"weights": np.array([1.0, np.nan, 0.0])}, "weights is not finite"),
        ({"weights": np.array([1.0])}, "weights has the shape"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Red when a snapshot of another model, format or set of features is taken over."""
    with pytest.raises(SnapshotInvalid, match=reason):
        snapshot.decode(resealed(**changes), FINGERPRINT, NAMES)


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    """Red without the bound: a sparse terabyte would be read into memory."""
    path = tmp_path / "learner.npz"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SnapshotInvalid, match="more than"):
        snapshot.load(path, FINGERPRINT, NAMES)


def test_what_cannot_be_used_is_set_aside_and_counted(tmp_path: Path) -> None:
    """Red when the daemon stops, or overwrites what a person may want to look at."""
    path = tmp_path / "learner.npz"
    path.write_bytes(b"not a snapshot")
    file, model = file_at(path), ReuseModel(NAMES)
    file.restore(model)
    assert (file.damaged, model.labels_learned) == (1, 0)
    assert not path.exists()
    assert path.with_name("learner.npz.damaged").read_bytes() == b"not a snapshot"


async def test_a_disk_that_refuses_is_counted(tmp_path: Path) -> None:
    """Red when OSError ends the loop, or counts as saved."""
    (tmp_path / "blocked").write_text("a file where a directory should be")
    file = file_at(tmp_path / "blocked" / "learner.npz")
    await file.save(taught(1))
    assert (file.failed, file.saved) == (1, 0)


async def test_a_full_disk_is_told_once_and_leaves_the_old_one(
    small_disk: SmallDisk,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Red before: learner.npz.tmp beside it, and a warning at every interval."""
    file = file_at(small_disk.path / "learner.npz")
    await file.save(taught(1))
    (small_disk.path / "ballast").write_bytes(b"x" * small_disk.free_bytes)
    for labels in (2, 3):
        await file.save(taught(labels))
    assert (file.saved, file.failed) == (1, 2)
    assert {path.name for path in small_disk.path.iterdir()} == {"learner.npz", "ballast"}
    assert [record.message for record in caplog.records] == ["snapshot not saved"]


async def test_a_crash_while_writing_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the snapshot itself is opened for writing."""
    path = tmp_path / "learner.npz"
    await file_at(path).save(taught(1))
    before = path.read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", crash)
    await file_at(path).save(taught(2))
    assert path.read_bytes() == before


async def test_writes_at_intervals_and_only_what_is_new(tmp_path: Path) -> None:
    """Red when it is due at every turn, or an idle daemon writes for ever."""
    file, model = file_at(tmp_path / "learner.npz"), taught(1)
    assert [file.is_due(now_s) for now_s in (0.0, 29.0, 30.0, 31.0, 60.0)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    await file.save(model)
    await file.save(model)
    assert file.saved == 1


async def test_without_a_path_nothing_is_kept() -> None:
    file, model = file_at(None), taught(1)
    file.restore(model)
    await file.save(model)
    assert (file.saved, file.failed, file.damaged) == (0, 0, 0)
