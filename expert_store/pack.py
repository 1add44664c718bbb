"""A checkpoint -> a self-contained store: aligned records, dense weights, config, tokenizer.
Offline, resumable.

Everything is written beside the target and moved there at the end, so the target is whole or as
it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import xxhash

from expert_store.architecture import Architecture, Part, read_architecture
from expert_store.checkpoint import Checkpoint, CheckpointTensor, read_chunks, read_header
from expert_store.durable import sync_folder, write_all
from expert_store.extents import ExpertRecord, Extent
from expert_store.index import expert_keys, expert_parts, make_spec, measure
from expert_store.manifest import MANIFEST_NAME, Manifest
from expert_store.progress import Journal, Report, silent
from expert_store.sources import SourceFile
from proto import errors
from proto.expert import DenseTensor, ExpertKey
from proto.shm import PAGE_BYTES, TENSOR_ALIGN_BYTES, align_up

RECORDS_NAME = "experts.bin"
DENSE_NAME = "dense.safetensors"
JOURNAL_NAME = "pack.journal"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_SYNC_BYTES = 256 * 1024 * 1024


def pack(
    root: Path, store_dir: Path, report: Report = silent, *, overwrite: bool = False
) -> Manifest:
    """Write a packed store of the checkpoint in `root` to `store_dir`.

    Holds one tensor in memory at a time. Killed and started again, it goes on where it was.
    Raises CheckpointUnsupported, ManifestInvalid (source damaged, disk full: the target is as it
    was).
    """
    root = root.resolve()
    checkpoint = Checkpoint.open(root)
    architecture = read_architecture(root, checkpoint.tensors)
    partial = store_dir.with_name(store_dir.name + ".partial")
    with _disk_full_explained(partial):
        _check_target(root, store_dir, overwrite)
        _check_space(architecture, checkpoint, partial, store_dir)
        partial.mkdir(parents=True, exist_ok=True)
        manifest = _write_store(root, partial, checkpoint, architecture, report)
        manifest.write(partial)
        (partial / JOURNAL_NAME).unlink()
        _publish(partial, store_dir)
    return manifest


def _write_store(
    root: Path, partial: Path, checkpoint: Checkpoint, architecture: Architecture, report: Report
) -> Manifest:
    with ExitStack() as stack:
        task = {
            "files": [[f.path, f.size_bytes, f.mtime_ns, f.header_digest] for f in checkpoint.files]
        }
        if not (partial / RECORDS_NAME).exists():  # the journal would promise what is gone
            (partial / JOURNAL_NAME).unlink(missing_ok=True)
        journal = Journal(partial / JOURNAL_NAME, task)
        stack.callback(journal.close)
        source = _Source(checkpoint, stack)
        records = _write_records(partial, architecture, source, journal, report)
        dense = _write_dense(partial, architecture, source)
        _copy_side_files(root, partial)
    return Manifest(
        format="packed",
        spec=make_spec(architecture, dense),
        sizing=measure(architecture),
        source_root=".",
        files=(_source_file(partial, RECORDS_NAME), _source_file(partial, DENSE_NAME)),
        records=records,
    ).sealed()


class _Source:
    """The checkpoint's bytes, without leaving them in the page cache."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._descriptors: list[int] = []
        for number in range(len(checkpoint.files)):
            descriptor = os.open(checkpoint.path(number), os.O_RDONLY)
            stack.callback(os.close, descriptor)
            self._descriptors.append(descriptor)

    def chunks(
        self, tensor: CheckpointTensor, offset_bytes: int, length_bytes: int
    ) -> Iterator[bytes]:
        try:
            yield from read_chunks(self._descriptors[tensor.file], offset_bytes, length_bytes)
        except EOFError as error:
            raise errors.ManifestInvalid(f"{tensor.name} cannot be read: {error}") from error


def record_layout(parts: list[tuple[Part, ...]]) -> tuple[tuple[int, ...], int]:
    """Offsets of an expert's tensors in its record, and the payload's end."""
    offsets, cursor = [], 0
    for tensor_parts in parts:
        cursor = align_up(cursor, TENSOR_ALIGN_BYTES)
        offsets.append(cursor)
        cursor += sum(part.length_bytes for part in tensor_parts)
    return tuple(offsets), cursor


def _write_records(
    partial: Path, architecture: Architecture, source: _Source, journal: Journal, report: Report
) -> dict[ExpertKey, ExpertRecord]:
    records: dict[ExpertKey, ExpertRecord] = {}
    keys = list(expert_keys(architecture))
    path = partial / RECORDS_NAME
    with path.open("r+b" if path.exists() else "w+b") as file:
        start_bytes = unsynced_bytes = 0
        for number, key in enumerate(keys):
            parts = expert_parts(architecture.layers[key.layer], key.expert)
            offsets, end_bytes = record_layout(parts)
            record_bytes = align_up(end_bytes)
            if str(key) not in journal.done:
                checksum = _write_record(
                    file.fileno(), start_bytes, parts, offsets, record_bytes, source
                )
                journal.add(str(key), checksum)
                unsynced_bytes += record_bytes
            if unsynced_bytes >= _SYNC_BYTES:
                os.fdatasync(file.fileno())  # the journal may promise only what is on disk
                journal.flush()
                unsynced_bytes = 0
            extents = _record_extents(parts, offsets, start_bytes)
            records[key] = ExpertRecord(key, extents, offsets, journal.done[str(key)])
            start_bytes += record_bytes
            report(start_bytes, start_bytes // (number + 1) * len(keys))
        file.truncate(start_bytes)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        journal.flush()
    return records


def _record_extents(
    parts: list[tuple[Part, ...]], offsets: tuple[int, ...], start_bytes: int
) -> tuple[Extent, ...]:
    """One extent where tensors fill the record without gaps, else one read per run between gaps."""
    extents: list[Extent] = []
    for offset, tensor_parts in zip(offsets, parts, strict=True):
        length = sum(part.length_bytes for part in tensor_parts)
        if extents and extents[-1].place_bytes + extents[-1].length_bytes == offset:
            extents[-1] = replace(extents[-1], length_bytes=extents[-1].length_bytes + length)
        else:
            extents.append(Extent(0, start_bytes + offset, length, offset))
    return tuple(extents)


def _write_record(
    descriptor: int,
    start_bytes: int,
    parts: list[tuple[Part, ...]],
    offsets: tuple[int, ...],
    record_bytes: int,
    source: _Source,
) -> int:
    digest = xxhash.xxh3_64()
    cursor = start_bytes
    for offset, tensor_parts in zip(offsets, parts, strict=True):
        cursor += write_all(descriptor, bytes(start_bytes + offset - cursor), cursor)
        for part in tensor_parts:
            for chunk in source.chunks(part.tensor, part.offset_bytes, part.length_bytes):
                digest.update(chunk)
                cursor += write_all(descriptor, chunk, cursor)
    write_all(descriptor, bytes(start_bytes + record_bytes - cursor), cursor)
    return digest.intdigest()


def _write_dense(
    partial: Path, architecture: Architecture, source: _Source
) -> tuple[DenseTensor, ...]:
    """The dense tensors as one safetensors file under their checkpoint names."""
    entries, cursor = {}, 0
    for tensor in architecture.dense:
        span = [cursor, cursor + tensor.length_bytes]
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        cursor += tensor.length_bytes
    header = json.dumps(entries).encode()
    header += b" " * (align_up(8 + len(header), TENSOR_ALIGN_BYTES) - 8 - len(header))
    described = []
    with (partial / DENSE_NAME).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in architecture.dense:
            offset_bytes, digest = file.tell(), xxhash.xxh3_64()
            for chunk in source.chunks(tensor, tensor.offset_bytes, tensor.length_bytes):
                digest.update(chunk)
                file.write(chunk)
            described.append(
                DenseTensor(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    file=DENSE_NAME,
                    offset_bytes=offset_bytes,
                    length_bytes=tensor.length_bytes,
                    checksum=digest.intdigest(),
                )
            )
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return tuple(described)


def _copy_side_files(root: Path, partial: Path) -> None:
    """Config, tokenizer, card, licence: everything beside the weights."""
    for path in root.iterdir():
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not is_weight:
            shutil.copyfile(path, partial / path.name)


def _source_file(folder: Path, name: str) -> SourceFile:
    stat = (folder / name).stat()
    digest = ""
    if name == DENSE_NAME:
        digest = xxhash.xxh3_128_hexdigest(read_header(folder / name)[1])
    return SourceFile(name, stat.st_size, stat.st_mtime_ns, digest)


def _check_target(root: Path, store_dir: Path, overwrite: bool) -> None:
    """Raises ManifestInvalid for a folder that must not be replaced."""
    if root.is_relative_to(store_dir.resolve()):
        raise errors.ManifestInvalid(f"{store_dir} holds the checkpoint itself: give another --out")
    if not store_dir.exists() or not any(store_dir.iterdir()):
        return
    if not (store_dir / MANIFEST_NAME).exists():
        raise errors.ManifestInvalid(f"{store_dir} holds other files: give another --out")
    if not overwrite:
        raise errors.ManifestInvalid(f"{store_dir} exists: give another --out, or --overwrite")


def _check_space(
    architecture: Architecture, checkpoint: Checkpoint, partial: Path, store_dir: Path
) -> None:
    needed = sum(tensor.length_bytes for tensor in checkpoint.tensors.values())
    needed += len(architecture.layers) * architecture.num_experts * PAGE_BYTES
    written = sum(f.stat().st_blocks * 512 for f in partial.iterdir()) if partial.exists() else 0
    store_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store_dir.parent).free + written
    if free < needed:
        raise errors.ManifestInvalid(
            f"packing needs {needed:,} bytes, {store_dir.parent} has {free:,} free: "
            "free some, or use `flashmoe index`, which copies nothing"
        )


@contextmanager
def _disk_full_explained(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise errors.ManifestInvalid(f"cannot pack: {error}") from error
        raise errors.ManifestInvalid(
            f"the disk is full: free some space and run the same command, it resumes from {partial}"
        ) from error


def _publish(partial: Path, store_dir: Path) -> None:
    replaced = store_dir.with_name(store_dir.name + ".replaced")
    if store_dir.exists():
        if replaced.exists():
            shutil.rmtree(replaced)  # of a run killed just before its end
        store_dir.rename(replaced)
    partial.rename(store_dir)
    sync_folder(store_dir.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
