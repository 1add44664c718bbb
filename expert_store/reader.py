"""Aligned direct reads of records into slots, at bounded depth, demand before prefetch; every
read is verified.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from mmap import mmap
from pathlib import Path

import xxhash

from expert_store.extents import ExpertRecord, Read, plan_reads
from expert_store.manifest import Manifest
from expert_store.sources import resolve_inside
from proto import errors
from proto.expert import ExpertKey
from proto.shm import PAGE_BYTES, align_up

logger = logging.getLogger(__name__)


class Priority(IntEnum):
    """Who waits. A lower number goes first."""

    DEMAND = 0
    PREFETCH = 1


class SourceFiles:
    """The store's files, open for direct reads, or for buffered ones that leave no page cache."""

    def __init__(self, paths: list[Path], direct_io: bool, stack: ExitStack) -> None:
        self.paths = paths
        self.direct = direct_io
        self._descriptors: list[int] = []
        for path in paths:
            descriptor = self._open(path)
            stack.callback(os.close, descriptor)
            self._descriptors.append(descriptor)

    def read(self, read: Read, slot: memoryview) -> None:
        """Fill the landing of `read`. Raises OSError, and EOFError when the file ends before the
        payload does.
        """
        extent, descriptor = read.extent, self._descriptors[read.extent.file]
        needed, done = read.skip_bytes + extent.length_bytes, 0
        landing, end = read.landing_bytes, read.landing_bytes + read.aligned_length_bytes
        while done < needed:
            # Given back at once: a view kept by an error's traceback keeps the segment mapped.
            with slot[landing + done : end] as rest:
                got = os.preadv(descriptor, [rest], read.aligned_offset_bytes + done)
            if got == 0 or (got % 512 and done + got < needed):
                raise EOFError(f"the file ends {needed - done - got} bytes early")
            done += got
        if not self.direct:
            os.posix_fadvise(
                descriptor, read.aligned_offset_bytes, align_up(done), os.POSIX_FADV_DONTNEED
            )

    def _open(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct:
            try:
                return _open_direct(path, flags)
            except OSError as error:
                self.direct = False
                logger.warning(
                    "direct I/O refused, reading through the page cache and dropping it",
                    extra={"file": str(path), "reason": error.strerror},
                )
        descriptor = os.open(path, flags)
        # Read-ahead would cache neighbours that nobody asked for and nobody drops.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor


def _open_direct(path: Path, flags: int) -> int:
    """Raises OSError where direct reads are refused, at open or at the first read."""
    descriptor = os.open(path, flags | os.O_DIRECT)
    try:
        with mmap(-1, PAGE_BYTES) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_record(files: SourceFiles, record: ExpertRecord, slot: memoryview) -> None:
    """Read a record into a slot, lay its extents in place, compare the checksum.

    Raises ExpertDamaged naming file, expert and remedy; the slot's content is then worthless.
    """
    digest = xxhash.xxh3_64()
    for read in plan_reads(record.extents):
        extent = read.extent
        try:
            files.read(read, slot)
        except (OSError, EOFError) as error:
            raise _damaged(files, record, extent.file, str(error)) from error
        if extent.place_bytes != read.arrived_bytes:
            _move(slot, extent.place_bytes, read.arrived_bytes, extent.length_bytes)
        with slot[extent.place_bytes : extent.place_bytes + extent.length_bytes] as payload:
            digest.update(payload)
    if digest.intdigest() != record.checksum:
        raise _damaged(files, record, record.extents[0].file, "its checksum differs")


def _move(slot: memoryview, to: int, start: int, length: int) -> None:
    """Overlapping copy towards the front; unlike slice assignment it makes no temporary."""
    base = ctypes.addressof(ctypes.c_char.from_buffer(slot))
    ctypes.memmove(base + to, base + start, length)


def _damaged(
    files: SourceFiles, record: ExpertRecord, file: int, problem: str
) -> errors.ExpertDamaged:
    return errors.ExpertDamaged(
        f"expert {record.key} in {files.paths[file]} is damaged ({problem}): "
        "run `flashmoe verify` on the store, restore the file, restart expert_store"
    )


@dataclass(order=True)
class _Waiter:
    priority: Priority
    number: int
    key: ExpertKey = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class ReadQueue:
    """At most `read_depth` reads at once; a demand that comes later still goes before every
    waiting prefetch.
    """

    def __init__(self, read_depth: int, max_queued: int) -> None:
        self._read_depth = read_depth
        self._max_queued = max_queued
        self._waiting: list[_Waiter] = []
        self._running = 0
        self._order = itertools.count()
        self._threads = ThreadPoolExecutor(read_depth, thread_name_prefix="read")

    @property
    def capacity(self) -> int:
        """How many reads may be under way or wait before a prefetch is dropped."""
        return self._read_depth + self._max_queued

    def check_room(self) -> None:
        """For a demand: prefetches do not count, it goes before them. Raises QueueFull."""
        num_waiting = sum(waiter.priority is Priority.DEMAND for waiter in self._waiting)
        if num_waiting >= self._max_queued:
            raise errors.QueueFull(f"{num_waiting} reads are waiting already: retry later")

    @asynccontextmanager
    async def turn(self, key: ExpertKey, priority: Priority) -> AsyncIterator[None]:
        """Wait for one of the `read_depth` turns, and keep it for the block."""
        waiter = _Waiter(
            priority, next(self._order), key, asyncio.get_running_loop().create_future()
        )
        heapq.heappush(self._waiting, waiter)
        self._admit()
        try:
            await waiter.turn
            yield
        finally:
            self._leave(waiter)

    def promote(self, key: ExpertKey) -> None:
        """Somebody waits for this prefetch now."""
        for waiter in self._waiting:
            if waiter.key == key and waiter.priority is not Priority.DEMAND:
                waiter.priority = Priority.DEMAND
                heapq.heapify(self._waiting)
                return

    async def run(self, work: Callable[[], None]) -> float:
        """Run blocking `work` in a reader thread; returns its seconds."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _timed, work)

    def close(self) -> None:
        self._threads.shutdown()

    def _leave(self, waiter: _Waiter) -> None:
        if waiter.turn.cancelled():
            self._waiting = [other for other in self._waiting if other is not waiter]
            heapq.heapify(self._waiting)
        else:  # also when cancelled after its turn came
            self._running -= 1
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._running < self._read_depth:
            waiter = heapq.heappop(self._waiting)
            if not waiter.turn.cancelled():
                self._running += 1
                waiter.turn.set_result(None)


def _timed(work: Callable[[], None]) -> float:
    start_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start_ns) / 1e9


@contextmanager
def open_files(manifest: Manifest, root: Path, direct_io: bool) -> Iterator[SourceFiles]:
    """The manifest's files for the block. Raises ManifestInvalid when one cannot be opened."""
    with ExitStack() as stack:
        paths = [resolve_inside(root, file.path) for file in manifest.files]
        try:
            files = SourceFiles(paths, direct_io, stack)
        except OSError as error:
            raise errors.ManifestInvalid(
                f"cannot open {error.filename}: {error.strerror}"
            ) from error
        yield files
