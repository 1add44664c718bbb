"""A file that a verb writes: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proto import errors


@contextmanager
def publishing(out: Path, remedy: str = "name a file in a folder that can") -> Iterator[Path]:
    """A file beside `out` to write; it takes the place of `out` when the block succeeds, and
    vanishes when not.

    Raises InvalidRequest at once when there can be none.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        partial.touch()
    except OSError as error:
        raise errors.InvalidRequest(
            f"{out} cannot be written ({error.strerror}): {remedy}"
        ) from error
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
