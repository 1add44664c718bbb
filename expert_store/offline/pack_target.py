"""The folder that a packed store becomes: looked at before anything is read, replaced as a whole at
the end.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from expert_store.manifest.durable import sync_folder
from expert_store.manifest.manifest import MANIFEST_NAME
from proto import errors


def check_target(root: Path, store_dir: Path, overwrite: bool) -> Path:
    """Where a store of the checkpoint in `root` goes: `store_dir`, its links followed, so that a
    link stays one. Changes nothing.

    Raises ManifestInvalid for what must not be replaced, or cannot be: the store is written beside
    the target and renamed.
    """
    target = Path(os.path.realpath(store_dir))
    if root.is_relative_to(target):
        raise errors.ManifestInvalid(f"{target} holds the checkpoint itself: give another --out")
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
