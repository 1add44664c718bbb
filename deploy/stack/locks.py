"""Files that living processes hold locked: the kernel frees a lock when its last holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

# How long a process that looks at a lock may keep it from its owner.
LOOK_S = 0.3
_POLL_S = 0.02
_PLAIN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in its place would never open


def hold(path: Path, wait_s: float = 0.0) -> int | None:
    """The descriptor of the file at `path`, made if need be, locked; None when others hold it.

    Children that inherit the descriptor hold the lock too. Never one that was removed meanwhile:
    who removes such a file holds it. Raises OSError.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o600)
        try:
            if _try(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline_s:
            return None
        time.sleep(_POLL_S)


def is_held(path: Path) -> bool:
    """Whether a living process holds it; a missing file is held by none. Raises OSError.

    Looking takes a shared lock for a moment: who wants the file for itself waits `LOOK_S`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _PLAIN)
    except FileNotFoundError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def holders(path: Path) -> list[int]:
    """The processes of ours that have the file open."""
    return sorted(
        int(process.name) for process in Path("/proc").glob("[0-9]*") if _has(process, path)
    )


def _has(process: Path, path: Path) -> bool:
    try:
        links = list((process / "fd").iterdir())
    except OSError:  # it ended, or is another user's
        return False
    return any(_leads_to(link, path) for link in links)


def _leads_to(link: Path, path: Path) -> bool:
    try:
        return os.readlink(link) == str(path)
    except OSError:  # it was closed meanwhile
        return False


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
