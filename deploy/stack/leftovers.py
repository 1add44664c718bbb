"""What killed stacks left behind: segments in shared memory, scratch run directories.

A file is left over when its locks are free: the kernel frees a lock when the last process that
holds it ends. Nothing is guessed from process ids, names or ages.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.stack import locks
from deploy.stack.run_dir import SEGMENT_PREFIX, SHARED_MEMORY, RunDir, presence_of

SCRATCH_PREFIX = "flashmoe-"  # run directories of `flashmoe run`, and of other verbs' own stacks
_SEGMENT = re.compile(rf"({SEGMENT_PREFIX}[0-9a-f]{{12}})(\.lock)?")
_SCRATCH = re.compile(rf"{SCRATCH_PREFIX}[a-z0-9_]{{8}}")


@dataclass(frozen=True)
class Leftover:
    """path: a segment or a scratch folder. locks: hold all of them to remove it"""

    path: Path
    locks: tuple[Path, ...]
    size_bytes: int


def find() -> list[Leftover]:
    """This user's files that no living process holds. Changes nothing."""
    return [
        leftover
        for leftover in (*_segments(), *_scratch_folders())
        if not any(_is_held(lock) for lock in leftover.locks)
    ]


def sweep() -> list[Leftover]:
    """Remove what is left over. Returns what had a size. `doctor` shows what cannot be removed."""
    removed = [leftover for leftover in find() if _remove(leftover)]
    return [leftover for leftover in removed if leftover.size_bytes]


def _segments() -> list[Leftover]:
    """Segments, and locks whose segment is gone, which take no memory."""
    matches = (_SEGMENT.fullmatch(path.name) for path in _listed(SHARED_MEMORY, stat.S_ISREG))
    segments = {SHARED_MEMORY / match[1] for match in matches if match}
    return [Leftover(s, (presence_of(s), s), _allocated_bytes(s)) for s in sorted(segments)]


def _scratch_folders() -> list[Leftover]:
    """Folders with a configuration: their launcher held the lock before it wrote one."""
    found = []
    for path in _listed(Path(tempfile.gettempdir()), stat.S_ISDIR):
        run = RunDir(path.resolve())
        if _SCRATCH.fullmatch(path.name) and run.config.is_file() and run.lock.is_file():
            size_bytes = sum(_allocated_bytes(file) for file in path.iterdir())
            found.append(Leftover(path, (run.lock, run.presence), size_bytes))
    return found


def _is_held(lock: Path) -> bool:
    try:
        return locks.is_held(lock)
    except OSError:  # another user's, or no plain file: nothing of ours to remove
        return True


def _listed(folder: Path, is_kind: Callable[[int], bool]) -> Iterator[Path]:
    """Entries of that kind that are this user's, links not followed. None where there is no such
    folder.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if found.st_uid == os.geteuid() and is_kind(found.st_mode):
                    yield Path(entry.path)


def _allocated_bytes(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _remove(leftover: Leftover) -> bool:
    """False when somebody took it meanwhile, or it cannot be removed."""
    with ExitStack() as held, suppress(OSError):
        for lock in leftover.locks:
            descriptor = locks.hold(lock)
            if descriptor is None:
                return False
            held.callback(os.close, descriptor)
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path)
        for file in leftover.locks:
            file.unlink(missing_ok=True)
        return True
    return False
