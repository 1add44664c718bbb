"""Linux's asynchronous reads: a request is submitted without waking a thread that then waits."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic

from expert_store.io import huge_pages
from expert_store.io.device import Device, R, Request, ThreadReads
from expert_store.io.files import PIECE_BYTES, SourceFiles
from expert_store.native import binding

logger = logging.getLogger(__name__)

_COUNT_BYTES = 8
_NUM_READERS = 2  # one asks and hands on while the other hashes; measured: tests/bench/LOG.md
_MOST_ASKING_RATIO, _TRIALS = 0.8, 3


class KernelQueue(Generic[R]):
    """At most `read_depth` requests in flight. Raises OSError where the kernel has no such queue.

    An eventfd counts what came, so that each thread takes one request, or hears that it is over.
    """

    num_readers = _NUM_READERS

    def __init__(self, files: SourceFiles, read_depth: int) -> None:
        self._functions = binding.load()
        self._files = files
        self._in_flight: dict[int, R] = {}
        self._refused: deque[R] = deque()
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

    def submit(self, requests: Sequence[R]) -> None:
        names = []
        for number, request in enumerate(requests):
            name = next(self._names)
            self._in_flight[name] = request
            self._write(number, name, request)
            names.append(name)
        taken = self._ask(len(names))
        for name in names[taken:]:
            self._refused.append(self._in_flight.pop(name))
            os.eventfd_write(self._came, 1)

    def wait(self) -> tuple[R, int] | None:
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
        first request.
        """
        with huge_pages.buffer(PIECE_BYTES) as memory:
            memory[:] = bytes(PIECE_BYTES)  # so that none of it has to be found first
            # One that was only interrupted while it asked does better the next time.
            return all(self._asking_ratio(memory) > _MOST_ASKING_RATIO for _ in range(_TRIALS))

    def _asking_ratio(self, memory: memoryview) -> float:
        """Of the time of a read; 1 when it is refused."""
        start_s = time.perf_counter()
        self._write(0, 0, Request(0, 0, memory, 0, PIECE_BYTES, PIECE_BYTES))
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

    def _write(self, number: int, name: int, request: Request) -> None:
        """The read of that number."""
        buffer = ctypes.addressof(ctypes.c_char.from_buffer(request.memory)) + request.start_bytes
        self._reads[number] = binding.Read(
            name,
            buffer,
            request.length_bytes,
            request.offset_bytes,
            self._files.descriptor(request.file),
        )

    def _warn(self, error: int) -> None:
        """Once: a reader reads by itself what the kernel refused, and may find out why."""
        if not self._has_warned:
            self._has_warned = True
            reason = os.strerror(error)
            logger.warning("a read refused, a reader reads it", extra={"reason": reason})


@contextmanager
def opened(files: SourceFiles, read_depth: int) -> Iterator[Device[Any]]:
    """The kernel's queue for the block; where it cannot be used, threads that read. Logs why."""
    if not files.direct:  # the kernel reads buffered files at once, while we hold the store's lock
        yield ThreadReads(read_depth)
        return
    try:
        device: KernelQueue[Any] = KernelQueue(files, read_depth)
    except OSError as error:
        yield _thread_reads(read_depth, str(error))
        return
    try:
        if device.reads_while_it_is_asked():
            yield _thread_reads(read_depth, "the file system reads while it is asked")
        else:
            yield device
    finally:
        device.close()


def _thread_reads(read_depth: int, reason: str) -> ThreadReads[Any]:
    logger.warning("no asynchronous reads, threads wait for them", extra={"reason": reason})
    return ThreadReads(read_depth)
