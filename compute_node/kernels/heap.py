"""Gives memory that the C library has free back to the kernel, where by itself it would keep it.

A prompt's buffers are large, and no two have one size, because each expert gets another number of
tokens: what is freed leaves holes that the next does not fit into. So does a tokenizer that was
read from its file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_MAPPED_BYTES = 1 << 20  # a prompt's buffers from this size on leave no hole
# Decode uses its buffers again: taking each from the kernel would cost more. What glibc comes to by
# itself once it saw a large one freed, as long as nobody sets either.
_LARGEST_BYTES, _KEPT_BYTES = 1 << 25, 1 << 26
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def mapped_buffers() -> Iterator[None]:
    """For the block, large buffers are mapped, and unmapped when they are freed. This holds for the
    whole process: one block at a time.
    """
    _set_thresholds(_MAPPED_BYTES)
    try:
        yield
    finally:
        _set_thresholds(_LARGEST_BYTES)
        trim()


@contextmanager
def kept_buffers() -> Iterator[None]:
    """For this block within one of `mapped_buffers`, decode uses its buffers again."""
    _set_thresholds(_LARGEST_BYTES)
    try:
        yield
    finally:
        _set_thresholds(_MAPPED_BYTES)


def trim() -> None:
    """What is free goes back to the kernel. Takes some ms. Without glibc nothing happens."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _set_thresholds(mapped_bytes: int) -> None:
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, mapped_bytes)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@cache
def _glibc() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
