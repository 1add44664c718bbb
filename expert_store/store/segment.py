"""The shared-memory segment: one file, allocated in full at start, written here and mapped
read-only by nodes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expert_store.io import huge_pages
from proto import errors, shm


class Segment:
    """Slots and their parts as writable views, and the generation of each."""

    def __init__(
        self,
        path: Path,
        mapping: mmap.mmap,
        layout: shm.SegmentLayout,
        epoch: int,
        huge_bytes: int,
    ) -> None:
        """huge_bytes: of the segment's, those that lie in huge pages."""
        self.path = path
        self.layout = layout
        self.epoch = epoch
        self.huge_bytes = huge_bytes
        self._view = memoryview(mapping)

    def view(self, slot: int, start_bytes: int, length_bytes: int) -> memoryview:
        """Bytes of a slot. The caller gives the view back with `with`."""
        start = self.layout.slot_offset_bytes(slot) + start_bytes
        return self._view[start : start + length_bytes]

    def bump_generation(self, slot: int, part: int) -> int:
        """Announce that the part's bytes are about to change."""
        generation = shm.read_generation(self._view, self.layout, slot, part) + 1
        shm.write_generation(self._view, self.layout, slot, part, generation)
        return generation

    def release(self) -> None:
        self._view.release()


@contextmanager
def create(path: Path, layout: shm.SegmentLayout) -> Iterator[Segment]:
    """A segment for the block; its file is removed at the end.

    A file that a crashed store left is formatted anew, under a new epoch: there is never a second
    one.
    Raises AlreadyRunning when another store holds the file, MemoryExceeded when the file system
    is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_claimed(path)
    try:
        huge_bytes = _allocate(descriptor, path, layout)
        with mmap.mmap(descriptor, layout.segment_bytes) as mapping:
            segment = Segment(path, mapping, layout, time.time_ns(), huge_bytes)
            _format(mapping, segment)
            try:
                yield segment
            finally:
                segment.release()
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open_claimed(path: Path) -> int:
    """The locked file behind `path`: again, when a store that stops removed it before it let go."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _claim(descriptor, path)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _claim(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise errors.AlreadyRunning(
            f"another expert_store holds {path}: stop it, or use another --run-dir"
        ) from error


def _allocate(descriptor: int, path: Path, layout: shm.SegmentLayout) -> int:
    """How much of it is huge pages. A full tmpfs is an error here and not a SIGBUS later."""
    try:
        return huge_pages.allocate(descriptor, layout.segment_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise errors.MemoryExceeded(
            f"{path.parent} has no room for a segment of {layout.segment_bytes:,} bytes "
            f"({error.strerror}): give fewer experts memory, or mount it larger"
        ) from error


def _format(mapping: mmap.mmap, segment: Segment) -> None:
    view = memoryview(mapping)
    try:
        for slot in range(segment.layout.num_slots):
            for part in range(segment.layout.most_parts):
                segment.bump_generation(slot, part)
        shm.write_header(view, segment.layout, segment.epoch)
    finally:
        view.release()
