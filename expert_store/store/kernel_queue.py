"""Linux's asynchronous reads: a piece is asked for without waking a thread that then waits.

Its system calls are called as they are: there are four, and what wraps them for Python reads into
memory of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import platform
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from expert_store.io import huge_pages
from expert_store.io.reader import PIECE_BYTES, SourceFiles
from expert_store.store.device import Device, Issued, ReadersThemselves

logger = logging.getLogger(__name__)

# io_setup, io_destroy, io_submit, io_getevents: asm/unistd_64.h, asm-generic/unistd.h
_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4), "riscv64": (0, 1, 2, 4)}
# linux/aio_abi.h. A request: data, key, rw_flags, opcode, priority, file, buffer, bytes, offset,
# reserved, flags, eventfd. An event: data, request, result, second result.
_REQUEST = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_READ, _TELL_EVENTFD = 0, 1
_COUNT_BYTES = 8
_NUM_READERS = 2  # one asks and hands on while the other hashes; measured: tests/bench/LOG.md
_MOST_ASKING_RATIO, _TRIALS = 0.8, 3

# How the C library calls them: number, five arguments. The second keeps Python's lock meanwhile.
_MAY_WAIT = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 6, use_errno=True)
_AT_ONCE = ctypes.PYFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 6)


class KernelQueue:
    """At most `read_depth` pieces in flight. Raises OSError where the kernel has no such queue.

    An eventfd counts what came, so that each reader takes one piece, or hears that it is over.
    """

    num_readers = _NUM_READERS

    def __init__(self, files: SourceFiles, read_depth: int) -> None:
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None:
            raise OSError(f"unknown system calls on {platform.machine()}")
        self._setup, self._destroy, self._submit, self._get_events = numbers
        self._call = _MAY_WAIT(("syscall", ctypes.CDLL(None)))
        self._call_at_once = _AT_ONCE(("syscall", ctypes.CDLL(None)))
        self._no_time = (ctypes.c_long * 2)(0, 0)
        self._files = files
        self._in_flight: dict[int, Issued] = {}
        self._refused: deque[Issued] = deque()
        self._names = itertools.count()
        self._is_over = self._has_warned = False
        self._requests = bytearray(read_depth * _REQUEST.size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._requests))
        addresses = range(start, start + len(self._requests), _REQUEST.size)
        self._pointers = (ctypes.c_uint64 * read_depth)(*addresses)
        self._context = ctypes.c_long(0)
        self._came = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        if self._call(self._setup, read_depth, ctypes.addressof(self._context), 0, 0, 0) < 0:
            os.close(self._came)
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        """Waits for what is in flight: nothing is written into a slot afterwards."""
        self._call(self._destroy, self._context.value, 0, 0, 0, 0)
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
        """How many of the first requests the kernel takes."""
        taken, start = 0, ctypes.addressof(self._pointers)
        while taken < count:
            rest = (count - taken, start + taken * ctypes.sizeof(ctypes.c_uint64))
            got = self._call(self._submit, self._context.value, *rest, 0, 0)
            if got <= 0:
                self._warn(ctypes.get_errno())
                break
            taken += got
        return taken

    def _event(self) -> tuple[int, int]:
        """Of a read that was counted: its name, and its bytes or an error below 0."""
        event = (ctypes.c_char * _EVENT.size)()
        where, no_time = ctypes.addressof(event), ctypes.addressof(self._no_time)
        context = self._context.value
        if self._call_at_once(self._get_events, context, 0, 1, where, no_time) != 1:
            raise OSError("the kernel counted a read that it does not tell")
        name, _, got_bytes, _ = _EVENT.unpack(event)
        return name, got_bytes

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
        """The request of that number."""
        buffer = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + landing_bytes
        where = (self._files.descriptor(file), buffer, length_bytes, offset_bytes)
        request = (name, 0, 0, _READ, 0, *where, 0, _TELL_EVENTFD, self._came)
        _REQUEST.pack_into(self._requests, number * _REQUEST.size, *request)

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
