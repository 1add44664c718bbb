"""Keeps the logs of daemons within a limit, with all that Valkey and C libraries write there."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

LIMIT_BYTES = 8 * 1024 * 1024
NO_ROOM = "the disk had no room to keep what this log said before\n"


def older(log: Path) -> Path:
    """The file that keeps a log's older lines."""
    return log.with_name(f"{log.name}.1")


def bound(log: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Begin a log anew that exceeds the limit, and keep its older lines in one file beside it.

    The file stays the same one, so that a process goes on writing (appending) where it does.
    """
    with suppress(OSError):  # a log that cannot be cut must not end the stack
        if log.stat().st_size > limit_bytes:
            _begin_anew(log)


def _begin_anew(log: Path) -> None:
    try:
        shutil.copyfile(log, older(log))
    except OSError:
        older(log).unlink(missing_ok=True)
        os.truncate(log, 0)
        with log.open("a") as file:
            file.write(NO_ROOM)
    else:
        os.truncate(log, 0)


def last_line(log: Path) -> str:
    """The last line of the log, or of its older part; empty when there is none."""
    for path in (log, older(log)):
        with suppress(FileNotFoundError):
            if lines := path.read_text(errors="replace").strip().splitlines():
                return lines[-1]
    return ""


def clear(log: Path) -> None:
    """Remove the log of an earlier run."""
    log.unlink(missing_ok=True)
    older(log).unlink(missing_ok=True)
