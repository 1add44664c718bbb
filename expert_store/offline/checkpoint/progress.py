"""How long offline work reports: bytes done of bytes to do, sentences for its user, and its journal
for resuming after a kill.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proto import errors

Report = Callable[[int, int], None]  # bytes done, bytes in all
Warn = Callable[[str], None]  # a sentence that a user should read


def unheard(sentence: str) -> None:
    """Warns nobody."""


def silent(done_bytes: int, total_bytes: int) -> None:
    """Reports to nobody."""


class Journal:
    """Checksums of what is finished, appended line by line; the first line says of what.

    A torn last line (killed while writing) is dropped; another task's journal is started over.
    Files of another time make another task: what was hashed before a change must not stand beside
    what is hashed after it.
    """

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        self._path = path
        self.done = _read_done(path, task)
        self._unwritten: list[Any] = [task, *(list(item) for item in self.done.items())]
        self.resumed = bool(self.done)
        with _failing_typed(path):
            # Unbuffered: what a full disk refused is not tried again when the file is closed.
            self._file = path.open("wb", buffering=0)
        try:
            self.flush()
        except BaseException:
            self.close()
            raise

    def add(self, name: str, checksum: int) -> None:
        self.done[name] = checksum
        self._unwritten.append([name, checksum])

    def flush(self) -> None:
        """Make the added entries durable. The caller has made durable what they promise before.

        Raises ManifestInvalid when it cannot be written, for lack of room say.
        """
        data = "".join(json.dumps(entry) + "\n" for entry in self._unwritten).encode()
        with _failing_typed(self._path):
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        self._unwritten.clear()

    def close(self) -> None:
        self._file.close()


@contextmanager
def _failing_typed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room, then run the same command" if full else "give another --out"
        raise errors.ManifestInvalid(f"cannot write {path} ({error.strerror}): {remedy}") from error


def _read_done(path: Path, task: dict[str, Any]) -> dict[str, int]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    if not lines or _parse(lines[0]) != task:
        return {}
    return dict(entry for entry in map(_parse, lines[1:]) if _is_entry(entry))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(item) for item in entry] == [str, int]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
