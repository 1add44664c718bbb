"""How long offline work reports: bytes done of bytes to do, and its journal for resuming after a
kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proto import errors

Report = Callable[[int, int], None]  # bytes done, bytes in all


def silent(done_bytes: int, total_bytes: int) -> None:
    """Reports to nobody."""


class Journal:
    """Checksums of what is finished, appended line by line; the first line says of what.

    A torn last line (killed while writing) is dropped; another task's journal is started over.
    """

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        self.done: dict[str, int] = {}
        self._unwritten: list[Any] = [task]
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and _parse(lines[0]) == task:
            for line in lines[1:]:
                entry = _parse(line)
                if isinstance(entry, list) and len(entry) == 2:
                    self.done[entry[0]] = entry[1]
        self.resumed = bool(self.done)
        try:
            self._file = path.open("w")
            self._unwritten.extend(list(item) for item in self.done.items())
            self.flush()
        except OSError as error:
            raise errors.ManifestInvalid(f"cannot write {path}: {error}") from error

    def add(self, name: str, checksum: int) -> None:
        self.done[name] = checksum
        self._unwritten.append([name, checksum])

    def flush(self) -> None:
        """Make what was added durable; whoever adds must have made durable what the entries
        promise.
        """
        self._file.writelines(json.dumps(entry) + "\n" for entry in self._unwritten)
        self._unwritten.clear()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
