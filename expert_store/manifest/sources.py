"""The files that a store reads, as they were when it was made; none lies outside its root."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proto import errors
from proto.checkpoint import hub_cache


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when indexed. path is relative to the source root."""

    path: str
    size_bytes: int
    mtime_ns: int
    header_digest: str

    def row(self) -> list[str | int]:
        """As documents have it."""
        return [self.path, self.size_bytes, self.mtime_ns, self.header_digest]


def resolve_name(files: Sequence[SourceFile], name: str) -> SourceFile:
    """The source file of that name. Raises ManifestInvalid."""
    for source in files:
        if source.path == name:
            return source
    raise errors.ManifestInvalid(f"file {name!r} is not among its files")


def resolve_inside(root: Path, relative: str) -> Path:
    """The file `relative` names under `root`, links resolved: those of a model hub's cache may
    lead to its blobs.

    Raises ManifestInvalid when it leaves the folder.
    """
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise errors.ManifestInvalid(f"path {relative!r} leaves the source folder")
    resolved = Path(os.path.realpath(root / path))  # unlike resolve(), a loop of links is no error
    if not hub_cache.allows(root, resolved):
        raise errors.ManifestInvalid(
            f"{root / path} leaves the source folder after its links (to {resolved}): make a store "
            "of its own with `flashmoe pack`"
        )
    return resolved
