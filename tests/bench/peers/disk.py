"""A disk of its own with a read-ahead of its own: an image file behind a loop device.

Mounting it anew before every run leaves nothing of it in the page cache. The loop device reads the
image directly, so that no byte is cached twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECTOR_BYTES = 512
KIB = 1024


class PeersDisk:
    """image: the file; folder: where it is mounted, one disk at a time."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image = image
        self.folder = folder
        self._device = ""

    def create(self, size_bytes: int) -> None:
        """An empty file system, its room allocated. Raises OSError when the disk is too small."""
        self._image.parent.mkdir(parents=True, exist_ok=True)
        partial = self._image.with_suffix(".partial")
        with partial.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        options = ["-m", "0", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0"]
        _run("mkfs.ext4", "-q", "-F", *options, str(partial))
        partial.rename(self._image)

    def delete(self) -> None:
        self.release()
        self._image.unlink(missing_ok=True)

    @property
    def exists(self) -> bool:
        return self._image.exists()

    @contextmanager
    def mounted(self, read_ahead_bytes: int) -> Iterator[Path]:
        """Where it is mounted, with an empty page cache, for the block."""
        self.release()
        self._device = _run("losetup", "--find", "--show", "--direct-io=on", str(self._image))
        try:
            _run("blockdev", "--setra", str(read_ahead_bytes // SECTOR_BYTES), self._device)
            self.folder.mkdir(parents=True, exist_ok=True)
            _run("mount", self._device, str(self.folder))
            yield self.folder
        finally:
            self.release()

    def release(self) -> None:
        """Unmount and detach, also what a killed run left."""
        if os.path.ismount(self.folder):
            _run("umount", str(self.folder))
        if self.exists:
            attached = _run("losetup", "--noheadings", "-O", "NAME", "-j", str(self._image))
            for device in attached.split():
                _run("losetup", "--detach", device)

    @property
    def bytes_read(self) -> int:
        """Since the device was made."""
        return sectors_read(Path(f"/sys/block/{Path(self._device).name}/stat").read_text()) * 512


def sectors_read(stat: str) -> int:
    """Of a line of /sys/block/DEVICE/stat."""
    return int(stat.split()[2])


def own_read_ahead_bytes(path: Path) -> int:
    """Of the disk that `path` is on."""
    number = os.stat(path).st_dev
    device = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    queue = Path(device) / "queue"
    if not queue.exists():  # a partition
        queue = Path(device).resolve().parent / "queue"
    return int((queue / "read_ahead_kb").read_text()) * KIB


def why_not() -> str | None:
    """Why no such disk can be made here; None when one can."""
    if os.geteuid() != 0:
        return "loop devices need root"
    for tool in ("losetup", "blockdev", "mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if not Path("/dev/loop-control").exists():
        return "there is no /dev/loop-control"
    return None


def _run(*command: str) -> str:
    """Raises OSError with what the command said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
