"""The folder that a packed store becomes: looked at before anything is read, replaced as a whole at
the end.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from expert_store.manifest.durable import sync_folder
from expert_store.manifest.manifest import MANIFEST_NAME
from expert_store.manifest.sources import SourceFile
from expert_store.offline.checkpoint.files import read_header
from expert_store.offline.companions import DENSE_NAME
from expert_store.offline.record_file import RECORDS_NAME
from proto import errors


def check_target(root: Path, store_dir: Path, overwrite: bool, source: str = "checkpoint") -> Path:
    """Where a store of the checkpoint in `root` goes: `store_dir`, its links followed, so that a
    link stays one. Changes nothing. source: what is in `root`

    Raises ManifestInvalid for what must not be replaced, or cannot be: the store is written beside
    the target and renamed.
    """
    target = Path(os.path.realpath(store_dir))
    if root.is_relative_to(target):
        raise errors.ManifestInvalid(f"{target} holds the {source} itself: give another --out")
    if target.exists():
        _check_replaceable(target, overwrite)
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise errors.ManifestInvalid(f"{above} cannot be written to: give another --out")
    return target


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.is_dir():
        raise errors.ManifestInvalid(f"{target} is a file: give another --out")
    inside = f"which cannot be replaced: give a folder in it, --out {target / 'store'}"
    if os.path.ismount(target) or str(target) in _mount_points():
        raise errors.ManifestInvalid(f"{target} is a mount point, {inside}")
    if Path.cwd().is_relative_to(target):
        raise errors.ManifestInvalid(f"{target} is the folder that you are in, {inside}")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST_NAME).exists():
        raise errors.ManifestInvalid(f"{target} holds other files: give another --out")
    if not overwrite:
        raise errors.ManifestInvalid(f"{target} exists: give another --out, or --overwrite")


def _mount_points() -> set[str]:
    """Also those of folders mounted on their own disk, which look like any other folder."""
    lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    return {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), x.split(" ")[4]) for x in lines}


def publish(partial: Path, target: Path) -> None:
    """Put the folder `partial` in the place of `target`. Raises OSError."""
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():
        if replaced.exists():
            shutil.rmtree(replaced)  # of a run killed just before its end
        target.rename(replaced)
    partial.rename(target)
    sync_folder(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def written_files(partial: Path) -> tuple[SourceFile, ...]:
    """The files of a packed store, as its manifest has them."""
    return tuple(_source_file(partial, name) for name in (RECORDS_NAME, DENSE_NAME))


def _source_file(folder: Path, name: str) -> SourceFile:
    stat = (folder / name).stat()
    digest = ""
    if name == DENSE_NAME:
        digest = xxhash.xxh3_128_hexdigest(read_header(folder / name)[1])
    return SourceFile(name, stat.st_size, stat.st_mtime_ns, digest)


def check_space(
    needed_bytes: int, partial: Path, store_dir: Path, doing: str, remedy: str = ""
) -> None:
    """Raises ManifestInvalid where the disk has less; what `partial` has of it is counted. doing:
    what needs so much; remedy: beside freeing some
    """
    written = sum(f.stat().st_blocks * 512 for f in partial.iterdir()) if partial.exists() else 0
    store_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store_dir.parent).free + written
    if free < needed_bytes:
        raise errors.ManifestInvalid(
            f"{doing} needs {needed_bytes:,} bytes, {store_dir.parent} has {free:,} free: "
            f"free some{remedy}"
        )


@contextmanager
def disk_full_explained(partial: Path, verb: str) -> Iterator[None]:
    """Raises ManifestInvalid for what a disk refuses in the block. verb: what is done"""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise errors.ManifestInvalid(f"cannot {verb}: {error}") from error
        raise errors.ManifestInvalid(
            f"the disk is full: free some space and run the same command, it resumes from {partial}"
        ) from error
