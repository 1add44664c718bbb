"""Verify names exactly what is damaged, and heals a store that was only touched.

Planted faults seen red: dense weights not read, only the first extent of a record hashed, times
recorded although something is damaged, times of a packed store compared.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from expert_store.offline.index import index
from expert_store.offline.record_file import RECORDS_NAME
from expert_store.offline.verify import verify
from proto import errors
from tests.checkpoints import make
from tests.expert_store.stores import FILE_NAME, KEYS, expert_range, flip
from tests.places import read_only


def test_a_sound_store_has_no_damage_and_says_how_far_it_is(store_dir: Path) -> None:
    manifest = Manifest.load(store_dir)
    seen: list[tuple[int, int]] = []
    before = (store_dir / MANIFEST_NAME).stat()
    assert verify(store_dir, report=lambda done, total: seen.append((done, total))) == []
    total = manifest.expert_bytes_total + manifest.spec.dense_bytes
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen
    assert (store_dir / MANIFEST_NAME).stat().st_ino == before.st_ino, "nothing to record"


@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_damaged_experts_are_named(seed: int, store_dir: Path) -> None:
    dice = random.Random(seed)
    victims = sorted(dice.sample(KEYS, 3))
    for key in victims:
        flip(store_dir / FILE_NAME, dice.choice(expert_range(key)))
    found = verify(store_dir)
    assert [damage.name for damage in found] == [str(key) for key in victims]
    assert {damage.file for damage in found} == {str(store_dir / FILE_NAME)}
    assert {damage.problem for damage in found} == {"its checksum differs"}


def test_bytes_between_experts_matter_to_nobody(store_dir: Path) -> None:
    flip(store_dir / FILE_NAME, expert_range(KEYS[0]).stop)
    assert verify(store_dir) == []


def test_every_extent_of_a_record_counts(tmp_path: Path) -> None:
    """A checkpoint that keeps an expert's weights and biases apart, fused over its experts."""
    root = make("gpt_oss", tmp_path / "checkpoint")
    index(root, tmp_path / "store")
    key, record = next(iter(Manifest.load(tmp_path / "store").records.items()))
    assert len(record.extents) > 1
    for extent in record.extents:
        last = extent.offset_bytes + extent.length_bytes - 1
        flip(root / "model.safetensors", last)
        assert [damage.name for damage in verify(tmp_path / "store")] == [str(key)]
        flip(root / "model.safetensors", last)


def test_a_damaged_dense_weight_is_named(store_dir: Path) -> None:
    dense = Manifest.load(store_dir).spec.dense[0]
    flip(store_dir / FILE_NAME, dense.offset_bytes + 3)
    assert [damage.name for damage in verify(store_dir)] == ["norm"]


def test_touched_files_are_healed_when_sound(store_dir: Path) -> None:
    os.utime(store_dir / FILE_NAME, ns=(7, 7))
    with pytest.raises(errors.SourceChanged):
        check_sources(Manifest.load(store_dir), store_dir)
    before = Manifest.load(store_dir)
    assert verify(store_dir) == []
    check_sources(Manifest.load(store_dir), store_dir)
    assert Manifest.load(store_dir).spec == before.spec


def copied(store: Path, target: Path) -> Path:
    """As `cp -r` does: the same bytes at another time."""
    shutil.copytree(store, target, copy_function=shutil.copyfile)
    for path in target.iterdir():
        os.utime(path, ns=(7, 7))
    return target


def test_a_copy_of_a_packed_store_is_as_good(packed: Path, tmp_path: Path) -> None:
    """Red when times count: on a read-only disk nobody could ever say that it is sound."""
    copy = copied(packed, tmp_path / "copy")
    check_sources(Manifest.load(copy), copy)
    before = (copy / MANIFEST_NAME).stat()
    assert verify(copy) == []
    assert (copy / MANIFEST_NAME).stat().st_ino == before.st_ino, "nothing to record"
    os.truncate(copy / RECORDS_NAME, 4096)
    with pytest.raises(errors.SourceChanged, match="4096 bytes"):
        check_sources(Manifest.load(copy), copy)


VERIFY = """
import sys
from pathlib import Path
from expert_store.offline.verify import verify
from proto import errors
try:
    print(verify(Path(sys.argv[1])))
except errors.ManifestInvalid as error:
    print(error)
"""


def test_read_only_stores_are_verified_too(packed: Path, store_dir: Path, tmp_path: Path) -> None:
    """Of a touched one in place, what to do is said: its times cannot be recorded."""
    said = {}
    for store in (copied(packed, tmp_path / "packed"), copied(store_dir, tmp_path / "in-place")):
        command = read_only(store, sys.executable, "-c", VERIFY, str(store))
        said[store.name] = subprocess.run(command, capture_output=True, text=True).stdout
    assert said["packed"] == "[]\n"
    assert "every byte is as it was indexed, but cannot write" in said["in-place"]
    assert "flashmoe index" in said["in-place"]


def test_touched_and_damaged_files_are_not(store_dir: Path) -> None:
    """Red when times are recorded anyway: the daemon would then start on damaged weights."""
    flip(store_dir / FILE_NAME, expert_range(KEYS[5])[0])
    os.utime(store_dir / FILE_NAME, ns=(7, 7))
    assert len(verify(store_dir)) == 1
    with pytest.raises(errors.SourceChanged, match="touched"):
        check_sources(Manifest.load(store_dir), store_dir)


def test_a_file_that_cannot_be_reached_is_not_called_missing(store_dir: Path) -> None:
    """Red when every OSError is: a folder that is closed to us was "missing: restore it"."""
    (store_dir / FILE_NAME).unlink()
    (store_dir / FILE_NAME).symlink_to(FILE_NAME)
    with pytest.raises(errors.SourceChanged, match=r"cannot be read \(Too many levels"):
        check_sources(Manifest.load(store_dir), store_dir)


def test_another_size_or_no_file_is_refused(store_dir: Path) -> None:
    os.truncate(store_dir / FILE_NAME, 1000)
    with pytest.raises(errors.SourceChanged, match="1000 bytes"):
        verify(store_dir)
    (store_dir / FILE_NAME).unlink()
    with pytest.raises(errors.SourceChanged, match="missing"):
        verify(store_dir)


def test_the_source_may_have_moved(store_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (store_dir / FILE_NAME).rename(moved / FILE_NAME)
    assert verify(store_dir, moved) == []
