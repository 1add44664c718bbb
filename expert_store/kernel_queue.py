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
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from expert_store.device import Device, Issued, ReadersThemselves
from expert_store.reader import SourceFiles

logger = logging.getLogger(__name__)

# io_setup, io_destroy, io_submit, io_getevents: asm/unistd_64.h, asm-generic/unistd.h
_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4), "riscv64": (0, 1, 2, 4)}
# linux/aio_abi.h. A request: data, key, rw_flags, opcode, priority, file, buffer, bytes, offset,
# reserved, flags, eventfd. An event: data, request, result, second result.
_REQUEST = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_READ, _TELL_EVENTFD = 0, 1
_NUM_READERS = 2  # one asks and hands on while the other hashes; measured: tests/bench/LOG.md

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
        self._requests = bytearray(read_depth * _REQUEST.size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._requests))
        addresses = range(start, start + len(self._requests), _REQUEST.size)
        self._pointers = (ctypes.c_uint64 * read_depth)(*addresses)
        self._context = ctypes.c_long(0)
        if self._call(self._setup, read_depth, ctypes.addressof(self._context), 0, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._came = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)

    def close(self) -> None:
        """Waits for what is in flight: nothing is written into a slot afterwards."""
        self._call(self._destroy, self._context.value, 0, 0, 0, 0)
        os.close(self._came)

    def submit(self, issued: Sequence[Issued]) -> None:
        names = [self._write(number, item) for number, item in enumerate(issued)]
        taken, start = 0, ctypes.addressof(self._pointers)
        while taken < len(names):
            rest = (len(names) - taken, start + taken * 8)
            got = self._call(self._submit, self._context.value, *rest, 0, 0)
            if got <= 0:
                break
            taken += got
        for name in names[taken:]:  # a reader reads it itself, and finds out why
            self._refused.append(self._in_flight.pop(name))
            os.eventfd_write(self._came, 1)

    def wait(self) -> tuple[Issued, int] | None:
        os.eventfd_read(self._came)
        if self._refused:
            try:
                return self._refused.popleft(), 0
            except IndexError:  # another reader took it, and left an event to this one
                pass
        event = (ctypes.c_char * _EVENT.size)()
        where, no_time = ctypes.addressof(event), ctypes.addressof(self._no_time)
        context = self._context.value
        if self._call_at_once(self._get_events, context, 0, 1, where, no_time) < 1:
            return None
        name, _, got_bytes, _ = _EVENT.unpack(event)
        return self._in_flight.pop(name), max(0, got_bytes)

    def stop(self) -> None:
        os.eventfd_write(self._came, self.num_readers)

    def _write(self, number: int, item: Issued) -> int:
        piece, name = item.piece, next(self._names)
        assert item.fill.view is not None
        slot = ctypes.addressof(ctypes.c_char.from_buffer(item.fill.view))
        self._in_flight[name] = item
        file, buffer = self._files.descriptor(piece.file), slot + piece.landing_bytes
        where = (buffer, piece.length_bytes, piece.offset_bytes)
        request = (name, 0, 0, _READ, 0, file, *where, 0, _TELL_EVENTFD, self._came)
        _REQUEST.pack_into(self._requests, number * _REQUEST.size, *request)
        return name


@contextmanager
def opened(files: SourceFiles, read_depth: int) -> Iterator[Device]:
    """The kernel's queue for the block, or readers that wait for what they read, told why."""
    if not files.direct:  # the kernel reads buffered files at once, while we hold the store's lock
        yield ReadersThemselves(read_depth)
        return
    try:
        device = KernelQueue(files, read_depth)
    except OSError as error:
        logger.warning("no asynchronous reads, threads wait for them", extra={"reason": str(error)})
        yield ReadersThemselves(read_depth)
        return
    try:
        yield device
    finally:
        device.close()
