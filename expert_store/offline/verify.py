"""Reads and checks every byte a manifest vouches for, and names what is damaged. Offline, no
torch.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from expert_store.manifest.manifest import IN_PLACE, Manifest, check_sources
from expert_store.manifest.sources import resolve_inside, resolve_name
from expert_store.offline.checkpoint.files import read_chunks
from expert_store.offline.checkpoint.progress import Report, silent
from proto import errors


@dataclass(frozen=True)
class Damage:
    """name: an expert's key or a dense tensor's name."""

    name: str
    file: str
    problem: str


def verify(store_dir: Path, source: Path | None = None, report: Report = silent) -> list[Damage]:
    """Every damaged expert and dense tensor of a store, in order; empty when all is well.

    An in-place store whose files were touched but hold the right bytes is healed: their times are
    recorded anew.
    Raises ManifestInvalid (also when that cannot be recorded), SourceChanged (a file missing or of
    another size).
    """
    manifest = Manifest.load(store_dir)
    root = manifest.root(store_dir, source)
    check_sources(manifest, root, times=False)
    found: list[Damage] = []
    with ExitStack() as stack:
        descriptors = [_open(resolve_inside(root, f.path), stack) for f in manifest.files]
        numbers = {file.path: number for number, file in enumerate(manifest.files)}
        total = manifest.expert_bytes_total + manifest.spec.dense_bytes
        done = 0
        for name, ranges, checksum in _ranges(manifest, numbers):
            problem = _check(descriptors, ranges, checksum)
            if problem:
                found.append(Damage(name, str(root / manifest.files[ranges[0][0]].path), problem))
            done += sum(length for _, _, length in ranges)
            report(done, total)
    if not found and manifest.format == IN_PLACE:
        _record_times(manifest, root, store_dir)
    return found


def _open(path: Path, stack: ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    return descriptor


def _ranges(
    manifest: Manifest, numbers: dict[str, int]
) -> list[tuple[str, list[tuple[int, int, int]], int]]:
    experts = [
        (
            str(key),
            [(e.file, e.offset_bytes, e.length_bytes) for e in record.extents],
            record.checksum,
        )
        for key, record in manifest.records.items()
    ]
    dense = [
        (
            t.name,
            [(numbers[resolve_name(manifest.files, t.file).path], t.offset_bytes, t.length_bytes)],
            t.checksum,
        )
        for t in manifest.spec.dense
    ]
    return experts + dense


def _check(descriptors: list[int], ranges: list[tuple[int, int, int]], checksum: int) -> str:
    digest = xxhash.xxh3_64()
    try:
        for file, offset_bytes, length_bytes in ranges:
            for chunk in read_chunks(descriptors[file], offset_bytes, length_bytes):
                digest.update(chunk)
    except (OSError, EOFError) as error:
        return f"cannot be read ({error})"
    return "" if digest.intdigest() == checksum else "its checksum differs"


def _record_times(manifest: Manifest, root: Path, store_dir: Path) -> None:
    files = tuple(
        replace(f, mtime_ns=resolve_inside(root, f.path).stat().st_mtime_ns) for f in manifest.files
    )
    if files == manifest.files:
        return
    try:
        replace(manifest, files=files).write(store_dir)
    except errors.ManifestInvalid as error:
        raise errors.ManifestInvalid(
            f"every byte is as it was indexed, but {error}, so that the next start would not know: "
            f"run `flashmoe index {root} --out DIR` with a folder that can be written"
        ) from error
