"""Memory for direct reads lies in huge pages where the kernel has them.

Planted faults seen red: the first page of each not allocated (nothing is gathered), the last part
page gathered too, the reservation kept, a full file system passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_store import huge_pages
from expert_store.huge_pages import HUGE_BYTES
from tests.expert_store.conftest import SmallDisk

SHM = Path("/dev/shm")


@pytest.fixture
def file() -> Iterator[int]:
    path = SHM / f"flashmoe-test-huge-{os.getpid()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    yield descriptor
    os.close(descriptor)


def in_huge_pages() -> int:
    found = re.search(r"ShmemHugePages:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_whole_huge_pages_are_gathered(file: int) -> None:
    length, before = 5 * HUGE_BYTES + 4096, in_huge_pages()
    os.ftruncate(file, length)
    maps = Path("/proc/self/maps").read_text().count("\n")
    gathered = huge_pages.lay_out(file, length)
    if gathered == 0:
        pytest.skip("this kernel gathers no huge pages in shared memory")
    assert gathered == 5 * HUGE_BYTES
    assert in_huge_pages() - before == gathered
    assert os.fstat(file).st_blocks * 512 == gathered
    assert abs(Path("/proc/self/maps").read_text().count("\n") - maps) <= 1


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
