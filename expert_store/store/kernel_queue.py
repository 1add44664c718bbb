"""Linux's asynchronous reads: a piece is asked for without waking a thread that then waits."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from expert_store.io import huge_pages
from expert_store.io.reader import PIECE_BYTES, SourceFiles
from expert_store.native import binding
from expert_store.store.device import Device, Issued, ReadersThemselves

logger = logging.getLogger(__name__)

_COUNT_BYTES = 8
_NUM_READERS = 2  # one asks and hands on while the other hashes; measured: tests/bench/LOG.md
_MOST_ASKING_RATIO, _TRIALS = 0.8, 3


class KernelQueue:
    """At most `read_depth` pieces in flight. Raises OSError where the kernel has no such queue.

    An eventfd counts what came, so that each reader takes one piece, or hears that it is over.
    """

    num_readers = _NUM_READERS

    def __init__(self, files: SourceFiles, read_depth: int) -> None:
        self._functions = binding.load()
        self._files = files
        self._in_flight: dict[int, Issued] = {}
        self._refused: deque[Issued] = deque()
        self._names = itertools.count()
        self._is_over = self._has_warned = False
        self._reads = (binding.Read * read_depth)()
        self._refusal, self._queue = ctypes.c_int64(0), ctypes.c_void_p(None)
        self._came = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        error = -self._functions.open(read_depth, self._came, ctypes.byref(self._queue))
        if error:
            os.close(self._came)
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        """Waits for what is in flight: nothing is written into a slot afterwards."""
        self._functions.close(self._queue)
        os.close(self._came)

    def submit(self, issued: Sequence[Issued]) -> None:
        names = []
        for number, item in enumerate(issued):
            name, piece, slot = next(self._names), item.piece, item.fill.view
            assert slot is not None
            self._in_flight[name] = item
            where = (slot, piece.landing_bytes, piece.length_bytes, piece.offset_bytes)
            self._write(number, name, piece.file, *where)
            names.append(name)
        taken = self._ask(len(names))
        for name in names[taken:]:
            self._refused.append(self._in_flight.pop(name))
            os.eventfd_write(self._came, 1)

    def wait(self) -> tuple[Issued, int] | None:
        """Raises OSError when the kernel counts a read and does not tell it."""
        os.read(self._came, _COUNT_BYTES)
        if self._is_over:
            return None
        try:
            return self._refused.popleft(), 0
        except IndexError:  # so it was the kernel that counted
            pass
        name, got_bytes = self._event()
        if got_bytes < 0:
            self._warn(-got_bytes)
        return self._in_flight.pop(name), max(0, got_bytes)

    def stop(self) -> None:
        self._is_over = True
        os.eventfd_write(self._came, self.num_readers)

    def reads_while_it_is_asked(self) -> bool:
        """What some file systems do although they take direct reads: found out by trial. Before the
        first piece.
        """
        with huge_pages.buffer(PIECE_BYTES) as memory:
            memory[:] = bytes(PIECE_BYTES)  # so that none of it has to be found first
            # One that was only interrupted while it asked does better the next time.
            return all(self._asking_ratio(memory) > _MOST_ASKING_RATIO for _ in range(_TRIALS))

    def _asking_ratio(self, memory: memoryview) -> float:
        """Of the time of a read; 1 when it is refused."""
        start_s = time.perf_counter()
        self._write(0, 0, 0, memory, 0, PIECE_BYTES, 0)
        if self._ask(1) < 1:
            return 1.0
        asked_s = time.perf_counter() - start_s
        os.read(self._came, _COUNT_BYTES)
        whole_s = time.perf_counter() - start_s
        self._event()
        return asked_s / whole_s

    def _ask(self, count: int) -> int:
        """How many of the first reads the kernel takes."""
        refusal = self._refusal
        taken = self._functions.submit(self._queue, self._reads, count, ctypes.byref(refusal))
        if refusal.value:
            self._warn(refusal.value)
        return int(taken)

    def _event(self) -> tuple[int, int]:
        """Of a read that was counted: its name, and its bytes or an error below 0."""
        event = binding.Event()
        if self._functions.event(self._queue, ctypes.byref(event)) != 1:
            raise OSError("the kernel counted a read that it does not tell")
        return event.name, event.got_bytes

    def _write(
        self,
        number: int,
        name: int,
        file: int,
        memory: memoryview,
        landing_bytes: int,
        length_bytes: int,
        offset_bytes: int,
    ) -> None:
        """The read of that number."""
        buffer = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + landing_bytes
        descriptor = self._files.descriptor(file)
        self._reads[number] = binding.Read(name, buffer, length_bytes, offset_bytes, descriptor)

    def _warn(self, error: int) -> None:
        """Once: a reader reads by itself what the kernel refused, and may find out why."""
        if not self._has_warned:
            self._has_warned = True
            reason = os.strerror(error)
            logger.warning("a read refused, a reader reads it", extra={"reason": reason})


@contextmanager
def opened(files: SourceFiles, read_depth: int) -> Iterator[Device]:
    """The kernel's queue for the block, or readers that wait for what they read, told why."""
    if not files.direct:  # the kernel reads buffered files at once, while we hold the store's lock
        yield ReadersThemselves(read_depth)
        return
    try:
        device = KernelQueue(files, read_depth)
    except OSError as error:
        yield _readers_themselves(read_depth, str(error))
        return
    try:
        if device.reads_while_it_is_asked():
            yield _readers_themselves(read_depth, "the file system reads while it is asked")
        else:
            yield device
    finally:
        device.close()


def _readers_themselves(read_depth: int, reason: str) -> Device:
    logger.warning("no asynchronous reads, threads wait for them", extra={"reason": reason})
    return ReadersThemselves(read_depth)
