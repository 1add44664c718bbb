"""Places that cannot be written or replaced. Commands see a folder mounted differently in a mount
namespace of their own: nothing is left when they end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
_MOUNT_POINT = 'mount -t tmpfs -o size=64m tmpfs "$0" && exec "$@"'
_BIND_MOUNT = 'mount --bind "$0" "$0" && exec "$@"'


@contextmanager
def not_root() -> Iterator[None]:
    """Without root's right to read and write everything, for the block."""
    own, other = os.getuid(), os.getuid() or 65534
    os.setresuid(other, other, own)
    try:
        yield
    finally:
        os.setresuid(own, own, own)


def read_only(folder: Path, *command: str) -> list[str]:
    """`command` for which nothing in `folder` can be written."""
    return _mounted(_READ_ONLY, folder, command)


def other_disk(folder: Path, *command: str) -> list[str]:
    """`command` for which `folder` is a small disk of its own, empty at first."""
    return _mounted(_MOUNT_POINT, folder, command)


def bind_mount(folder: Path, *command: str) -> list[str]:
    """`command` for which `folder` is a mount point on the same disk."""
    return _mounted(_BIND_MOUNT, folder, command)


def _mounted(script: str, folder: Path, command: tuple[str, ...]) -> list[str]:
    prefix = ["unshare", "--mount", "sh", "-c", script, str(folder)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("a folder cannot be mounted in a namespace here: that takes root")
    return [*prefix, *command]
