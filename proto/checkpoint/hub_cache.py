"""Where a checkpoint's files may lie outside its own folder. A model hub's cache keeps a revision
as a folder of links into the blobs of its model. Store and node follow these links and no others.

    models--ORG--NAME/blobs/DIGEST
    models--ORG--NAME/snapshots/REVISION/model.safetensors -> ../../blobs/DIGEST
"""

from __future__ import annotations

import os
from pathlib import Path


def mounted(root: Path) -> Path:
    """The folder that holds every file of a checkpoint in `root`, linked blobs included.

    root: a real path
    """
    blobs = root.parent.parent / "blobs"
    return blobs.parent if root.parent.name == "snapshots" and blobs.is_dir() else root


def allows(root: Path, resolved: Path) -> bool:
    """Whether a checkpoint in `root` may have a file at `resolved`: inside `root`, or among the
    blobs of the hub cache that `root` is a revision of.

    resolved: a path without links
    """
    inside = Path(os.path.realpath(root))
    if resolved.is_relative_to(inside):
        return True
    of_cache = inside.parent.name == "snapshots"
    return of_cache and resolved.parent == inside.parent.parent / "blobs"
