"""The kernel's queue where it is refused, and what it brings in part; that it reads is in
test_store.py, for both devices.

Planted faults seen red: refused pieces forgotten, a short read taken for whole, no word to the log,
buffered files asked of the kernel, no trial read, no io_destroy, a library of other sources used.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.io import kernel_queue
from expert_store.io.device import ThreadReads
from expert_store.io.files import SourceFiles
from expert_store.io.kernel_queue import KernelQueue
from expert_store.manifest.manifest import Manifest
from expert_store.native import binding
from expert_store.store.assembly import Assembly
from expert_store.store.fill import Fill, PieceRead, Priority
from expert_store.store.verified_read import open_files
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    expert_bytes,
    expert_range,
    write_store,
)

DEPTH = 4


@contextmanager
def pieces(folder: Path, piece_bytes: int = 4096) -> Iterator[list[PieceRead]]:
    """Of the first expert, in memory of its own."""
    manifest = Manifest.load(folder)
    with mmap.mmap(-1, manifest.slot_bytes) as memory, memoryview(memory) as view:
        fill = Fill(manifest.records[KEYS[0]], Priority.DEMAND, view=view)
        fill.assembly = Assembly(fill.record, view, piece_bytes)
        yield [fill.next_read() for _ in fill.assembly.pieces][:DEPTH]


@contextmanager
def a_queue(folder: Path) -> Iterator[KernelQueue]:
    with files_of(folder) as files, closing(KernelQueue(files, DEPTH)) as device:
        yield device


def files_of(folder: Path, direct_io: bool = True) -> AbstractContextManager[SourceFiles]:
    return open_files(Manifest.load(folder), folder, direct_io)


def test_pieces_come_with_their_bytes(store_dir: Path) -> None:
    with a_queue(store_dir) as device, pieces(store_dir) as asked:
        device.submit(asked)
        came = [device.wait() for _ in asked]
        assert {item[0].number for item in came if item} == set(range(len(asked)))
        assert all(item and item[1] >= item[0].needed_bytes for item in came)
        fill = asked[0].fill
        assert fill.assembly is not None and fill.view is not None
        assert [fill.assembly.arrive(item.number) for item in asked][-1]
        place = fill.record.extents[0].place_bytes
        content = bytes(fill.view[place : place + fill.record.payload_bytes])
        assert content == expert_bytes(store_dir, KEYS[0])


def test_what_fails_on_the_way_comes_back_unread(store_dir: Path) -> None:
    """Here for memory that no direct read can go to, a byte off."""
    with a_queue(store_dir) as device, pieces(store_dir) as asked:
        with asked[0].memory[1:] as odd:
            device.submit([replace(read, memory=odd) for read in asked])
            came = [device.wait() for _ in asked]
        assert sorted(item[0].number for item in came if item) == [item.number for item in asked]
        assert {item[1] for item in came if item} == {0}


def test_what_the_kernel_does_not_take_comes_back_unread(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with a_queue(store_dir) as device, pieces(store_dir) as asked:
        monkeypatch.setattr(SourceFiles, "descriptor", lambda files, file: 1 << 20)
        device.submit(asked[:1])
        device.submit(asked[1:2])
        monkeypatch.undo()
        device.submit(asked[2:])
        came = dict(item for item in (device.wait() for _ in asked) if item)
        assert [came[item] > 0 for item in asked] == [False, False, *[True] * len(asked[2:])]
    reasons = [record.__dict__["reason"] for record in caplog.records]
    assert reasons == [os.strerror(errno.EBADF)], "said once"


def test_a_file_that_ends_early_brings_what_there_is(store_dir: Path) -> None:
    end = expert_range(KEYS[0])[0] + 5000
    os.truncate(store_dir / FILE_NAME, end)
    with ExitStack() as stack:
        files = SourceFiles([store_dir / FILE_NAME], True, stack)
        device = stack.enter_context(closing(KernelQueue(files, DEPTH)))
        asked = stack.enter_context(pieces(store_dir))
        device.submit(asked)
        came = sum(item[1] for item in (device.wait() for _ in asked) if item)
    assert came == end


def test_every_reader_hears_that_it_is_over(store_dir: Path) -> None:
    with a_queue(store_dir) as device:
        device.stop()
        assert [device.wait() for _ in range(device.num_readers)] == [None] * device.num_readers


def test_buffered_files_are_left_to_the_readers(store_dir: Path) -> None:
    with files_of(store_dir, direct_io=False) as files, kernel_queue.opened(files, 3) as device:
        assert isinstance(device, ThreadReads)
        assert device.num_readers == 4


def test_a_file_system_that_reads_while_it_is_asked_is_left_to_the_readers(
    shared_memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store's lock is held meanwhile. tmpfs takes direct reads since Linux 6.6."""
    write_store(shared_memory / "store")
    with (shared_memory / "store" / FILE_NAME).open("ab") as file:
        file.write(bytes(4 << 20))  # so that reading takes longer than asking
    with (
        caplog.at_level(logging.WARNING),
        files_of(shared_memory / "store") as files,
        kernel_queue.opened(files, 3) as device,
    ):
        assert isinstance(device, ThreadReads)
    assert len(caplog.records) == 1


def test_a_disk_is_asked_and_reads_by_itself(store_dir: Path) -> None:
    with files_of(store_dir) as files, kernel_queue.opened(files, 3) as device:
        assert isinstance(device, KernelQueue)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_FOLDER", Path("/nowhere"), binding.NOT_COMPILED),
        ("_VERSION", 0, binding.OUTDATED),
    ],
)
def test_falls_back_loudly_without_the_library(
    name: str,
    value: object,
    reason: str,
    store_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(binding, name, value)
    assert falls_back(store_dir, caplog) == reason


def test_falls_back_loudly_where_the_kernel_refuses(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one without these calls does."""
    functions = dataclasses.replace(binding.load(), open=lambda *arguments: -errno.ENOSYS)
    monkeypatch.setattr(binding, "load", lambda: functions)
    assert falls_back(store_dir, caplog) == os.strerror(errno.ENOSYS)


def falls_back(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The reason in the log."""
    with (
        caplog.at_level(logging.WARNING),
        files_of(folder) as files,
        kernel_queue.opened(files, 3) as device,
    ):
        assert isinstance(device, ThreadReads)
    (record,) = caplog.records
    assert record.message.split(",")[0] == "no asynchronous reads"
    return str(record.__dict__["reason"]).split("] ")[-1]


def test_closing_gives_everything_back(store_dir: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("[aio]")

    before = held()
    with files_of(store_dir) as files, pieces(store_dir) as asked:
        device = KernelQueue(files, DEPTH)
        device.submit(asked)
        device.close()
    assert held() == before
