"""Reads are verified and leave no page cache behind.

Planted faults seen red: no checksum comparison, a short read taken for whole, the buffered path
without its fadvise.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from expert_store.io.files import SourceFiles
from expert_store.manifest.manifest import Manifest
from expert_store.store.verified_read import open_files, read_record
from proto import errors
from proto.expert import RecordKey
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    expert_bytes,
    expert_range,
    flip,
    write_store,
)


@contextmanager
def a_slot(manifest: Manifest) -> Iterator[memoryview]:
    """Aligned memory, as a slot of the segment is."""
    with mmap.mmap(-1, manifest.slot_bytes) as memory, memoryview(memory) as view:
        yield view


def read(files: SourceFiles, manifest: Manifest, key: RecordKey) -> bytes:
    record = manifest.records[key]
    with a_slot(manifest) as slot:
        read_record(files, record, slot)
        place = record.extents[0].place_bytes
        return bytes(slot[place : place + record.payload_bytes])


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def opened(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("direct_io", [True, False])
def test_every_expert_arrives_whole(direct_io: bool, store_dir: Path) -> None:
    manifest = Manifest.load(store_dir)
    with open_files(manifest, store_dir, direct_io) as files:
        for key in KEYS:
            assert read(files, manifest, key) == expert_bytes(store_dir, key)


def test_falls_back_loudly_where_direct_reads_are_refused(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Red when it is silent, or logged once a file."""
    manifest = Manifest.load(store_dir)
    paths = [store_dir / FILE_NAME] * 3
    refuse_direct(monkeypatch)
    with caplog.at_level(logging.WARNING), ExitStack() as stack:
        files = SourceFiles(paths, True, stack)
        assert not files.direct
        assert [read(files, manifest, key) for key in KEYS] == [
            expert_bytes(store_dir, key) for key in KEYS
        ]
    assert [record.message.split(",")[0] for record in caplog.records] == ["direct I/O refused"]


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore counts cached pages")
def test_buffered_reads_leave_no_page_cache(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    manifest = write_store(folder)
    with open_files(manifest, folder, direct_io=False) as files:
        drop_cache(folder / FILE_NAME)
        if cached_pages(folder / FILE_NAME):
            pytest.skip("this file system keeps files in memory")
        for key in KEYS:
            read(files, manifest, key)
        assert cached_pages(folder / FILE_NAME) <= len(KEYS), "a page shared by two may stay"


def drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached_pages(path: Path) -> int:
    command = ["fincore", "--noheadings", "--output", "pages", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout or 0)


@pytest.mark.parametrize("direct_io", [True, False])
def test_damage_names_file_expert_and_remedy(direct_io: bool, store_dir: Path) -> None:
    manifest = Manifest.load(store_dir)
    flip(store_dir / FILE_NAME, expert_range(KEYS[3])[-1])
    with open_files(manifest, store_dir, direct_io) as files:
        with pytest.raises(errors.ExpertDamaged, match="checksum") as caught:
            read(files, manifest, KEYS[3])
        assert read(files, manifest, KEYS[4]) == expert_bytes(store_dir, KEYS[4])
    for word in (str(KEYS[3]), str(store_dir / FILE_NAME), "flashmoe verify"):
        assert word in str(caught.value)


@pytest.mark.parametrize("direct_io", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 511, 512, 4095, 4096, 12287])
def test_a_cut_off_file_is_damage(keep: int, direct_io: bool, store_dir: Path) -> None:
    """Truncated while the daemon runs, anywhere inside the record."""
    manifest = Manifest.load(store_dir)
    with open_files(manifest, store_dir, direct_io) as files:
        os.truncate(store_dir / FILE_NAME, expert_range(KEYS[2]).start + keep)
        with pytest.raises(errors.ExpertDamaged, match=rf"{KEYS[2]}.*ends .* bytes early"):
            read(files, manifest, KEYS[2])
        assert read(files, manifest, KEYS[1]) == expert_bytes(store_dir, KEYS[1])


def test_short_reads_are_continued(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may hand over less than was asked, in whole sectors."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, v, o: real(d, [v[0][:512]], o))
    manifest = Manifest.load(store_dir)
    with open_files(manifest, store_dir, direct_io=False) as files:
        assert read(files, manifest, KEYS[2]) == expert_bytes(store_dir, KEYS[2])


def test_a_device_error_is_damage(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    manifest = Manifest.load(store_dir)
    with open_files(manifest, store_dir, direct_io=False) as files:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(errors.ExpertDamaged, match="Input/output error"):
            read(files, manifest, KEYS[0])


def test_a_file_that_cannot_be_opened_is_named(store_dir: Path) -> None:
    manifest = Manifest.load(store_dir)
    (store_dir / FILE_NAME).unlink()
    with (
        pytest.raises(errors.ManifestInvalid, match=FILE_NAME),
        open_files(manifest, store_dir, True),
    ):
        pass
