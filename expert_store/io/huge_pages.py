"""Lays a shared-memory file out in huge pages.

A direct read is one transfer for each run of adjacent memory, and single pages lie as memory
happened to be free: measured here, the same disk reads 0.9 GB/s into scattered pages and 2 GB/s
into huge ones (tests/bench/LOG.md). No mount option or privilege is needed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HUGE_BYTES = 2 * 1024 * 1024
_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MADV_COLLAPSE = 25  # linux/mman.h, since 6.1; older kernels refuse it
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
_MOST_FAILURES = 16

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_C.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def allocate(descriptor: int, length_bytes: int) -> int:
    """A shared-memory file of that length, all of it allocated: how many bytes lie in huge pages.

    Raises OSError when the file system is full.
    """
    os.ftruncate(descriptor, length_bytes)
    gathered_bytes = lay_out(descriptor, length_bytes)
    os.posix_fallocate(descriptor, 0, length_bytes)
    return gathered_bytes


def lay_out(descriptor: int, length_bytes: int) -> int:
    """How many bytes of a shared-memory file now lie in huge pages: 0 where the kernel has none of
    2 MiB. The rest may not be allocated yet.

    Raises OSError when the file system is full.
    """
    whole_bytes = length_bytes // HUGE_BYTES * HUGE_BYTES
    if not whole_bytes or not _are_known():
        return 0
    reserved_bytes = whole_bytes + HUGE_BYTES
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    reserved = _C.mmap(None, reserved_bytes, 0, private, -1, 0)
    if reserved == _FAILED:
        return 0
    try:
        start = -(-reserved // HUGE_BYTES) * HUGE_BYTES
        access, fixed = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if _C.mmap(start, whole_bytes, access, fixed, descriptor, 0) != start:
            return 0
        return _gather(descriptor, start, whole_bytes)
    finally:
        _C.munmap(reserved, reserved_bytes)


def _gather(descriptor: int, start: int, whole_bytes: int) -> int:
    """start: where the file is mapped. Some may be in use or have no memory left; where all fail
    the kernel cannot.
    """
    gathered_bytes = num_failures = 0
    for offset in range(0, whole_bytes, HUGE_BYTES):
        os.posix_fallocate(descriptor, offset, mmap.PAGESIZE)  # it takes one page to gather
        if _C.madvise(start + offset, HUGE_BYTES, _MADV_COLLAPSE) == 0:
            gathered_bytes += HUGE_BYTES
            continue
        num_failures += 1
        if ctypes.get_errno() == errno.EINVAL or num_failures == _MOST_FAILURES:
            break
    return gathered_bytes


def _are_known() -> bool:
    try:
        return int(_PAGE_SIZE.read_text()) == HUGE_BYTES
    except (OSError, ValueError):
        return False


@contextmanager
def buffer(length_bytes: int) -> Iterator[memoryview]:
    """Memory of one process for the block, in huge pages where the kernel gives them."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, length_bytes, private) as memory, memoryview(memory) as view:
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        yield view
