"""Memory for direct reads lies in huge pages where the kernel has them.

Planted faults seen red: the first page of each not allocated (nothing is gathered), the last part
page gathered too, the mapping kept, the first failure the last, another size of huge pages taken
for 2 MiB, a buffer of shared memory, a full file system passed over.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_store.io import huge_pages
from expert_store.io.huge_pages import HUGE_BYTES
from tests.expert_store.conftest import SmallDisk

SHM = Path("/dev/shm")
NAME = f"flashmoe-test-huge-{os.getpid()}"


@pytest.fixture
def file() -> Iterator[int]:
    path = SHM / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    yield descriptor
    os.close(descriptor)


def huge_bytes(name: str, field: str) -> int:
    """Of this process's mapping of that name, as the kernel counts them."""
    entries = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    found = [re.search(rf"{field}:\s+(\d+) kB", entry) for entry in entries if name in entry]
    return sum(int(match[1]) * 1024 for match in found if match)


def test_whole_huge_pages_are_gathered(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 5 * HUGE_BYTES + 4096
    os.ftruncate(file, length)
    seen = list[int]()
    real = huge_pages._gather

    def gather(descriptor: int, start: int, whole_bytes: int) -> int:
        gathered = real(descriptor, start, whole_bytes)
        ctypes.memset(start, 1, whole_bytes)
        seen.append(huge_bytes(NAME, "ShmemPmdMapped"))
        return gathered

    monkeypatch.setattr(huge_pages, "_gather", gather)
    gathered = huge_pages.lay_out(file, length)
    if gathered == 0:
        pytest.skip("this kernel gathers no huge pages in shared memory")
    assert [gathered] == seen == [5 * HUGE_BYTES]
    assert os.fstat(file).st_blocks * 512 == gathered
    assert NAME not in Path("/proc/self/maps").read_text(), "it is not mapped any more"


def test_what_fails_once_is_passed_over(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.ftruncate(file, 5 * HUGE_BYTES)
    calls = itertools.count()
    real = huge_pages._C.madvise

    def advise(*arguments: int) -> int:
        if next(calls) == 2:
            ctypes.set_errno(errno.EAGAIN)
            return -1
        return int(real(*arguments))

    monkeypatch.setattr(huge_pages._C, "madvise", advise)
    if (gathered := huge_pages.lay_out(file, 5 * HUGE_BYTES)) == 0:
        pytest.skip("this kernel gathers no huge pages in shared memory")
    assert gathered == 4 * HUGE_BYTES


def test_a_kernel_with_other_pages_is_left_alone(
    file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.ftruncate(file, HUGE_BYTES)
    size = tmp_path / "size"
    size.write_text(str(512 << 20))
    for path in (size, tmp_path / "none"):
        monkeypatch.setattr(huge_pages, "_PAGE_SIZE", path)
        assert huge_pages.lay_out(file, HUGE_BYTES) == 0


def test_a_buffer_is_huge_where_the_kernel_gives_them() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel gives no huge pages")
    before = huge_bytes("", "AnonHugePages")
    with huge_pages.buffer(8 * HUGE_BYTES) as view:
        view[:] = bytes(8 * HUGE_BYTES)
        assert huge_bytes("", "AnonHugePages") - before >= 7 * HUGE_BYTES


def test_what_is_shorter_is_left_alone(file: int) -> None:
    os.ftruncate(file, HUGE_BYTES - 1)
    assert huge_pages.lay_out(file, HUGE_BYTES - 1) == 0
    assert os.fstat(file).st_blocks == 0


def test_other_files_stay_as_they_are(tmp_path: Path) -> None:
    """On a disk nothing can be gathered: said by 0, and by nothing else."""
    with (tmp_path / "file").open("w+b") as plain:
        os.ftruncate(plain.fileno(), 2 * HUGE_BYTES)
        assert huge_pages.lay_out(plain.fileno(), 2 * HUGE_BYTES) == 0


def test_a_full_file_system_is_an_error(small_disk: SmallDisk) -> None:
    with (small_disk.path / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), 2 * HUGE_BYTES)
        (small_disk.path / "filler").write_bytes(bytes(small_disk.free_bytes))
        with pytest.raises(OSError, match="No space left"):
            huge_pages.lay_out(file.fileno(), 2 * HUGE_BYTES)
