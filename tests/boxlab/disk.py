"""A disk of a box: an image with a store behind a loop device of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True)
class Disk:
    """folder: where it is mounted; device: /dev/loopN"""

    folder: Path
    device: str

    @property
    def major_minor(self) -> str:
        number = os.stat(self.device).st_rdev
        return f"{os.major(number)}:{os.minor(number)}"

    @property
    def bytes_read(self) -> int:
        """Since it was mounted."""
        name = Path(self.device).name
        return int(Path(f"/sys/block/{name}/stat").read_text().split()[2]) * 512


def make_image(folder: Path, image: Path) -> None:
    """A file system with what `folder` has. Raises OSError, also when the disk is too small."""
    content_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    partial = image.with_suffix(".partial")
    with partial.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(content_bytes * 1.03) + 8 * MIB)
    options = ["-m", "0", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0"]
    run("mkfs.ext4", "-q", "-F", *options, "-d", str(folder), str(partial))
    partial.rename(image)


@contextmanager
def mounted(image: Path, folder: Path, *, shared: bool) -> Iterator[Disk]:
    """At `folder`, for the block. The image is read directly, so that no byte is cached twice.

    shared: with other disks, so that nobody can write
    Raises OSError.
    """
    folder.mkdir(parents=True)
    only = (["--read-only"], ["-o", "ro,noload"]) if shared else ([], [])
    device = run("losetup", "--find", "--show", "--direct-io=on", *only[0], str(image))
    try:
        run("mount", *only[1], device, str(folder))
    finally:
        run("losetup", "--detach", device)  # once it is unmounted, also after a kill
    try:
        yield Disk(folder, device)
    finally:
        run("umount", str(folder))


def unmount_below(folder: Path) -> None:
    """What a killed run left."""
    for line in Path("/proc/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            run("umount", place)


def run(*command: str) -> str:
    """What it prints. Raises OSError with what the command said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
