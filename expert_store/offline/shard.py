"""A store -> a store with a share of its experts, for one of several boxes. Offline, no torch.

Records are copied from where the store has them, in its own folder or in a checkpoint in place, and
keep their checksums, as the model keeps its fingerprint. Written beside the target and moved there
at the end; killed and started again, it goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial as bound
from pathlib import Path

import xxhash

from expert_store.manifest.durable import write_all
from expert_store.manifest.extents import ExpertRecord, Extent
from expert_store.manifest.manifest import Manifest, check_sources
from expert_store.manifest.share import Share
from expert_store.manifest.sources import resolve_inside
from expert_store.offline.checkpoint.files import read_chunks
from expert_store.offline.checkpoint.progress import Report, silent
from expert_store.offline.companions import copy_side_files, write_dense
from expert_store.offline.pack_target import (
    check_space,
    check_target,
    disk_full_explained,
    publish,
    written_files,
)
from expert_store.offline.record_file import JOURNAL_NAME, RecordFile, record_file
from proto import errors
from proto.expert import DenseTensor
from proto.shm import TENSOR_ALIGN_BYTES, align_up


def shard(
    store_dir: Path,
    share: Share,
    target: Path,
    source: Path | None = None,
    report: Report = silent,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Write `share` of the store in `store_dir` to `target`. source: where the store's files are
    now, if they moved

    Raises ManifestInvalid (the store is a share itself or damaged, more shares than a layer has
    experts, the disk full: the target is as it was), SourceChanged.
    """
    whole, store_dir = Manifest.load(store_dir), store_dir.resolve()
    if whole.share is not None:
        raise errors.ManifestInvalid(
            f"{store_dir} is {whole.share} itself: make shares of a store that has all experts"
        )
    experts = share.experts(whole.spec)
    root = whole.root(store_dir, source)
    target = check_target(store_dir, target, overwrite, "store")
    target = check_target(root, target, overwrite)
    check_sources(whole, root)
    records = [moved(record) for key, record in whole.records.items() if key.expert in experts]
    partial = target.with_name(target.name + ".partial")
    with ExitStack() as stack, disk_full_explained(partial, "shard"):
        needed = sum(align_up(_end(record)) for record, _ in records)
        check_space(needed + whole.spec.dense_bytes, partial, target, str(share))
        partial.mkdir(parents=True, exist_ok=True)
        files = _Files(whole, root, stack)
        task: dict[str, object] = {
            "model": whole.spec.fingerprint,
            "files": [file.row() for file in whole.files],
            "share": [share.owner, share.owners, share.copies],
        }
        with record_file(partial, task, needed, report) as file:
            copied = [_copy(record, runs, files, file) for record, runs in records]
        dense = write_dense(partial, whole.spec.dense, files.dense_chunks)
        _check_dense(whole.spec.dense, dense)
        copy_side_files(root, partial, None)
        manifest = replace(
            whole,
            format="packed",
            spec=replace(whole.spec, dense=dense),
            source_root=".",
            files=written_files(partial),
            records={record.key: record for record in copied},
            share=share,
        )
        manifest.write(partial)
        (partial / JOURNAL_NAME).unlink()
        publish(partial, target)
    return manifest


Run = tuple[int, Sequence[Extent]]
"""Extents whose bytes lie in a slot without a gap, and where in a record they begin now."""


def moved(record: ExpertRecord) -> tuple[ExpertRecord, Sequence[Run]]:
    """The record as it will lie in a file of records that begins with it, and what is copied there.
    Its bytes keep their order, so that its checksum stays; gaps between them go, as far as tensors
    stay aligned.
    """
    runs: list[tuple[int, list[Extent]]] = []
    shifts: list[tuple[int, int]] = []  # where a run began in the slot, by how much it moved
    end = after = 0  # of the latest run, before and now
    for extent in record.extents:
        if runs and extent.place_bytes == end:
            runs[-1][1].append(extent)
        else:
            misfit = extent.place_bytes % TENSOR_ALIGN_BYTES
            start = align_up(after, TENSOR_ALIGN_BYTES) + misfit
            runs.append((start, [extent]))
            shifts.append((extent.place_bytes, start - extent.place_bytes))
            after = start
        end = extent.place_bytes + extent.length_bytes
        after += extent.length_bytes
    offsets = tuple(
        offset + next(shift for place, shift in reversed(shifts) if place <= offset)
        for offset in record.tensor_offsets
    )
    return replace(record, extents=tuple(_joined(runs)), tensor_offsets=offsets), runs


def _joined(runs: Sequence[Run]) -> Iterator[Extent]:
    """One extent for runs that follow one another without a gap."""
    start = end = -1
    for place, extents in runs:
        if place != end:
            if start >= 0:
                yield Extent(0, start, end - start, start)
            start = place
        end = place + sum(extent.length_bytes for extent in extents)
    yield Extent(0, start, end - start, start)


def _end(record: ExpertRecord) -> int:
    last = record.extents[-1]
    return last.place_bytes + last.length_bytes


def _copy(
    record: ExpertRecord, runs: Sequence[Run], files: _Files, file: RecordFile
) -> ExpertRecord:
    """Raises ManifestInvalid for a record whose bytes are not those that were indexed."""
    copy = bound(files.copy, record=record, runs=runs)
    start_bytes, _ = file.add(record.key, _end(record), copy)
    extents = (
        replace(extent, offset_bytes=start_bytes + extent.offset_bytes) for extent in record.extents
    )
    return replace(record, extents=tuple(extents))


def _check_dense(expected: Sequence[DenseTensor], found: Sequence[DenseTensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        if one.checksum != other.checksum:
            raise _damaged(one.name)


def _damaged(name: str) -> errors.ManifestInvalid:
    return errors.ManifestInvalid(
        f"{name} is damaged: run `flashmoe verify` on the store, which names the file, restore it, "
        "then run the same command"
    )


class _Files:
    """The store's files, open for the life of `stack`."""

    def __init__(self, manifest: Manifest, root: Path, stack: ExitStack) -> None:
        self._names = [file.path for file in manifest.files]
        self._descriptors = []
        for name in self._names:
            self._descriptors.append(os.open(resolve_inside(root, name), os.O_RDONLY))
            stack.callback(os.close, self._descriptors[-1])

    def dense_chunks(self, tensor: DenseTensor) -> Iterator[bytes]:
        number = self._names.index(tensor.file)
        return self._chunks(number, tensor.offset_bytes, tensor.length_bytes)

    def copy(
        self, descriptor: int, start_bytes: int, record: ExpertRecord, runs: Sequence[Run]
    ) -> int:
        """Into the file, from `start_bytes` on. Returns the checksum."""
        digest, cursor = xxhash.xxh3_64(), start_bytes
        for place, extents in runs:
            cursor += write_all(descriptor, bytes(start_bytes + place - cursor), cursor)
            for extent in extents:
                for chunk in self._chunks(extent.file, extent.offset_bytes, extent.length_bytes):
                    digest.update(chunk)
                    cursor += write_all(descriptor, chunk, cursor)
        if digest.intdigest() != record.checksum:
            raise _damaged(f"expert {record.key}")
        return record.checksum

    def _chunks(self, number: int, offset_bytes: int, length_bytes: int) -> Iterator[bytes]:
        """Raises ManifestInvalid for a file that ends early."""
        try:
            yield from read_chunks(self._descriptors[number], offset_bytes, length_bytes)
        except EOFError as error:
            raise errors.ManifestInvalid(
                f"{self._names[number]} cannot be read: {error}"
            ) from error
