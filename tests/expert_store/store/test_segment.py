"""One segment, whole from the start, never two.

Planted faults seen red: no flock, no fallocate (a full tmpfs passes), the old epoch kept, a file
claimed that its owner had just removed, the file left behind.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from expert_store.io import huge_pages
from expert_store.store import segment
from proto import errors, shm
from proto.shm import SegmentLayout
from tests.expert_store.conftest import SmallDisk

PAGE = shm.PAGE_BYTES


def header(path: Path) -> tuple[shm.SegmentLayout, int]:
    return shm.read_header(memoryview(path.read_bytes()), path.stat().st_size)


def test_a_segment_is_there_for_the_block_and_then_gone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "segment"
    with segment.create(path, SegmentLayout(3, 2 * PAGE)) as created:
        assert header(path) == (created.layout, created.epoch)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_blocks * 512 >= created.layout.segment_bytes, "allocated in full"
        with created.view(2, 0, 2 * PAGE) as view:
            view[:] = b"x" * (2 * PAGE)
        assert path.read_bytes()[created.layout.slot_offset_bytes(2) :] == b"x" * (2 * PAGE)
    assert not path.exists()


def test_a_second_store_is_told_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    with segment.create(path, SegmentLayout(3, PAGE)) as first:
        with (
            pytest.raises(errors.AlreadyRunning, match="another expert_store"),
            segment.create(path, SegmentLayout(9, PAGE)),
        ):
            pass
        assert header(path) == (first.layout, first.epoch), "the first one is unharmed"


@pytest.mark.parametrize("num_slots", [1, 3, 9])
def test_what_a_crash_left_is_formatted_anew(num_slots: int, tmp_path: Path) -> None:
    """Smaller, as large, larger: a new epoch, and generations that a stale lease cannot match."""
    path = tmp_path / "segment"
    with segment.create(path, SegmentLayout(3, PAGE)) as old:
        generation, left = old.bump_generation(0, 0), path.read_bytes()
    path.write_bytes(left)
    with segment.create(path, SegmentLayout(num_slots, PAGE)) as new:
        assert new.epoch != old.epoch
        assert header(path) == (new.layout, new.epoch)
        data = memoryview(path.read_bytes())
        assert path.stat().st_size == new.layout.segment_bytes
        assert shm.read_generation(data, new.layout, 0, 0) > generation


def test_too_little_shared_memory_is_an_error_at_start(small_disk: SmallDisk) -> None:
    path = small_disk.path / "segment"
    with (
        pytest.raises(errors.MemoryExceeded, match=r"no room .*No space left.*fewer experts"),
        segment.create(path, SegmentLayout(64, PAGE)),
    ):
        pass
    assert not path.exists()
    with segment.create(path, SegmentLayout(4, PAGE)):
        pass


def test_a_file_removed_by_its_owner_is_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without a second look: a stopping store removes the file between our open and lock,
    and nodes would find none under the path of a store that is ready.
    """
    path, real = tmp_path / "segment", fcntl.flock

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with segment.create(path, SegmentLayout(3, PAGE)) as created:
        assert header(path) == (created.layout, created.epoch)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "segment").symlink_to("mine")
    with (
        pytest.raises(OSError, match="symbolic links"),
        segment.create(tmp_path / "segment", SegmentLayout(3, PAGE)),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_error_inside_leaves_no_file(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with (
        pytest.raises(ValueError, match="mine"),
        segment.create(tmp_path / "segment", SegmentLayout(3, PAGE)),
    ):
        raise ValueError("mine")
    assert not (tmp_path / "segment").exists()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_its_slots_lie_in_huge_pages(shared_memory: Path) -> None:
    """Red when nobody lays it out, or says how much."""
    with segment.create(
        shared_memory / "segment", SegmentLayout(8, huge_pages.HUGE_BYTES)
    ) as created:
        probe = shared_memory / "probe"
        with probe.open("w+b") as file:
            file.truncate(huge_pages.HUGE_BYTES)
            is_given = huge_pages.lay_out(file.fileno(), huge_pages.HUGE_BYTES)
        assert created.huge_bytes == (8 * huge_pages.HUGE_BYTES if is_given else 0)
