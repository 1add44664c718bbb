"""Reads a main node's file of other boxes again whenever it was written anew."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from compute_node.boxes.workers_file import WorkersFile
from proto import errors

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


class FileWatch:
    """Use as a context manager: `take` hears what the file says, at the start on the caller's
    thread, then on one of its own. A file that cannot be read, or that `take` refuses, changes
    nothing.

    take: raises ConfigInvalid, before it does anything

    Raises ConfigInvalid when the file cannot be read at the start, and what `take` raises then.
    """

    def __init__(self, path: Path, take: Callable[[WorkersFile], None]) -> None:
        self._path, self._take = path, take
        self._seen: tuple[int, int] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="workers file", daemon=True)

    def __enter__(self) -> FileWatch:
        self._seen = self._mark()
        self._take(WorkersFile.load(self._path))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_S):
            if (mark := self._mark()) == self._seen:
                continue
            self._seen = mark
            try:
                self._take(WorkersFile.load(self._path))
            except errors.ConfigInvalid as error:
                logger.warning("workers file unread", extra={"reason": str(error)})

    def _mark(self) -> tuple[int, int] | None:
        """What differs once the file was written again."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns
