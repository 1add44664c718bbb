"""Writes that are whole, and on disk when asked for."""

from __future__ import annotations

import os
from pathlib import Path


def write_all(descriptor: int, data: bytes, offset_bytes: int) -> int:
    """Every byte of `data`, at `offset_bytes`; returns how many. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset_bytes + done)
    return done


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
