"""ExpertKey -> where its bytes lie on disk and in a slot; immutable once loaded.

A record is a list of extents. An extent is read page-aligned into the slot at its *landing*, and
moved down to its
*place* when the two differ, so that every tensor ends up whole and 64-byte aligned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from proto import errors
from proto.expert import DTYPE_BYTES, DenseTensor, ExpertKey, ModelSpec, TensorLayout
from proto.shm import PAGE_BYTES, TENSOR_ALIGN_BYTES, align_up

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class Extent:
    """`length_bytes` at `offset_bytes` of file number `file` belong at `place_bytes` of the
    slot.
    """

    file: int
    offset_bytes: int
    length_bytes: int
    place_bytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """One aligned read: the extent, and where in the slot its first page lands."""

    extent: Extent
    landing_bytes: int

    @property
    def skip_bytes(self) -> int:
        return self.extent.offset_bytes % PAGE_BYTES

    @property
    def aligned_offset_bytes(self) -> int:
        return self.extent.offset_bytes - self.skip_bytes

    @property
    def aligned_length_bytes(self) -> int:
        return align_up(self.skip_bytes + self.extent.length_bytes)

    @property
    def arrived_bytes(self) -> int:
        """Where in the slot the payload stands after the read, before it is moved."""
        return self.landing_bytes + self.skip_bytes


def plan_reads(extents: Sequence[Extent]) -> list[Read]:
    """Landings in ascending order, one after another on whole pages."""
    reads: list[Read] = []
    cursor = 0
    for extent in extents:
        read = Read(extent, cursor)
        reads.append(read)
        cursor += read.aligned_length_bytes
    return reads


def slot_bytes_needed(extents: Sequence[Extent]) -> int:
    last = plan_reads(extents)[-1]
    return last.landing_bytes + last.aligned_length_bytes


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """tensor_offsets: within the slot, in the order of the layer's layout. checksum: xxh3_64 of
    the extents in order.
    """

    key: ExpertKey
    extents: tuple[Extent, ...]
    tensor_offsets: tuple[int, ...]
    checksum: int

    @property
    def payload_bytes(self) -> int:
        return sum(extent.length_bytes for extent in self.extents)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when indexed. path is relative to the source root."""

    path: str
    size_bytes: int
    mtime_ns: int
    header_digest: str


@dataclass(frozen=True)
class Sizing:
    """What the planner must know of the model without loading it."""

    dense_bytes: int
    cache_bytes_per_token: int
    cache_bytes_fixed: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    activated_dense_bytes: int
    eager_attention_heads: int  # 0 where attention never holds a score per pair of positions


@dataclass(frozen=True)
class Manifest:
    """Of one store: everything the daemon needs, and nothing it has to interpret."""

    format: str
    spec: ModelSpec
    sizing: Sizing
    source_root: str
    files: tuple[SourceFile, ...]
    records: dict[ExpertKey, ExpertRecord]

    @property
    def slot_bytes(self) -> int:
        return max(slot_bytes_needed(record.extents) for record in self.records.values())

    @property
    def expert_bytes_total(self) -> int:
        return sum(record.payload_bytes for record in self.records.values())

    def root(self, store_dir: Path, override: Path | None = None) -> Path:
        """Where the source files are: `override`, else what was recorded, relative to the store."""
        return Path(os.path.realpath(override or store_dir / self.source_root))

    def sealed(self) -> Manifest:
        """This manifest with the fingerprint its content has."""
        digest = hashlib.sha256(json.dumps(_content(self), sort_keys=True).encode()).hexdigest()[
            :32
        ]
        return replace(self, spec=replace(self.spec, fingerprint=digest))

    def write(self, store_dir: Path) -> None:
        """Publish atomically: write, fsync, rename, fsync the folder.

        Raises ManifestInvalid when the folder cannot be written.
        """
        target = store_dir / MANIFEST_NAME
        partial = target.with_suffix(".partial")
        data = json.dumps(signed(_document(self)), separators=(",", ":")).encode()
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
            with partial.open("wb", buffering=0) as file:
                write_all(file.fileno(), data, 0)
                os.fsync(file.fileno())
            partial.replace(target)
            sync_folder(store_dir)
        except OSError as error:
            raise errors.ManifestInvalid(f"cannot write {target}: {error.strerror}") from error

    @classmethod
    def load(cls, store_dir: Path) -> Manifest:
        """Raises ManifestInvalid naming the file and what does not add up."""
        path = store_dir / MANIFEST_NAME
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise errors.ManifestInvalid(
                f"{store_dir} is not a store (no {MANIFEST_NAME}): make one with `flashmoe index`"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise errors.ManifestInvalid(f"{path} cannot be read: {error}") from error
        return cls.parse(document, str(path))

    @classmethod
    def parse(cls, document: Any, name: str) -> Manifest:
        """Raises ManifestInvalid."""
        try:
            manifest = _parse(document)
            _check(manifest)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise errors.ManifestInvalid(f"{name} is damaged ({error!r}): index again") from error
        except errors.ManifestInvalid as error:
            raise errors.ManifestInvalid(f"{name}: {error}") from error
        return manifest


def write_all(descriptor: int, data: bytes, offset_bytes: int) -> int:
    """Every byte of `data`, at `offset_bytes`; returns how many. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset_bytes + done)
    return done


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_inside(root: Path, relative: str) -> Path:
    """The file `relative` names under `root`, links resolved.

    Raises ManifestInvalid when it leaves the folder.
    """
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise errors.ManifestInvalid(f"path {relative!r} leaves the source folder")
    resolved = Path(os.path.realpath(root / path))  # unlike resolve(), a loop of links is no error
    if not resolved.is_relative_to(os.path.realpath(root)):
        raise errors.ManifestInvalid(f"path {relative!r} leaves the source folder after its links")
    return resolved


def check_sources(manifest: Manifest, root: Path, *, times: bool = True) -> None:
    """Compare the files on disk with what was indexed: size always, time unless told otherwise.

    Raises SourceChanged naming the file.
    """
    for source in manifest.files:
        path = resolve_inside(root, source.path)
        try:
            stat = path.stat()
        except OSError as error:
            raise errors.SourceChanged(
                f"{path} is missing: restore it, or name its folder with --source"
            ) from error
        if stat.st_size != source.size_bytes:
            raise errors.SourceChanged(
                f"{path} has {stat.st_size} bytes, {source.size_bytes} when indexed: index again"
            )
        if times and stat.st_mtime_ns != source.mtime_ns:
            raise errors.SourceChanged(
                f"{path} was touched after it was indexed: run `flashmoe verify` on the store"
            )


# --- the document ---------------------------------------------------------------------------------


def _content(manifest: Manifest) -> dict[str, Any]:
    """What the fingerprint covers: names, layouts and checksums, not where files lie."""
    return {
        "format": manifest.format,
        "spec": _spec_document(manifest.spec) | {"fingerprint": ""},
        "checksums": [[str(key), record.checksum] for key, record in manifest.records.items()],
    }


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "format": manifest.format,
        "source_root": manifest.source_root,
        "spec": _spec_document(manifest.spec),
        "sizing": vars(manifest.sizing),
        "files": [[f.path, f.size_bytes, f.mtime_ns, f.header_digest] for f in manifest.files],
        "experts": [_record_row(record) for record in manifest.records.values()],
    }


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the digest of everything else in it."""
    body = {name: value for name, value in document.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return body | {"digest": digest}


def _record_row(record: ExpertRecord) -> list[Any]:
    extents = [[e.file, e.offset_bytes, e.length_bytes, e.place_bytes] for e in record.extents]
    key = record.key
    return [key.layer, key.expert, extents, list(record.tensor_offsets), f"{record.checksum:016x}"]


def _spec_document(spec: ModelSpec) -> dict[str, Any]:
    return {
        "fingerprint": spec.fingerprint,
        "model_type": spec.model_type,
        "moe_layers": list(spec.moe_layers),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layouts": {
            str(layer): [[t.name, t.dtype, list(t.shape)] for t in tensors]
            for layer, tensors in spec.layouts.items()
        },
        "dense": [
            [t.name, t.dtype, list(t.shape), t.file, t.offset_bytes, t.length_bytes, t.checksum]
            for t in spec.dense
        ],
    }


def _parse(document: Any) -> Manifest:
    if document["version"] != FORMAT_VERSION:
        raise errors.ManifestInvalid(
            f"format version {document['version']}, this program reads {FORMAT_VERSION}: index "
            "again"
        )
    if document["digest"] != signed(document)["digest"]:
        raise errors.ManifestInvalid("its digest differs, so it was changed: index again")
    return Manifest(
        format=_string(document["format"]),
        spec=_parse_spec(document["spec"]),
        sizing=Sizing(**{name: _count(value) for name, value in document["sizing"].items()}),
        source_root=_path(document["source_root"]),
        files=tuple(
            SourceFile(_path(path), _count(size), _count(mtime), _string(digest))
            for path, size, mtime, digest in document["files"]
        ),
        records={record.key: record for record in map(_parse_record, document["experts"])},
    )


def _parse_record(row: Any) -> ExpertRecord:
    layer, expert, extents, offsets, checksum = row
    return ExpertRecord(
        key=ExpertKey(_count(layer), _count(expert)),
        extents=tuple(Extent(*map(_count, extent)) for extent in extents),
        tensor_offsets=tuple(map(_count, offsets)),
        checksum=_count(int(checksum, 16)),
    )


def _parse_spec(document: Any) -> ModelSpec:
    return ModelSpec(
        fingerprint=_string(document["fingerprint"]),
        model_type=_string(document["model_type"]),
        moe_layers=tuple(map(_count, document["moe_layers"])),
        num_experts=_count(document["num_experts"]),
        top_k=_count(document["top_k"]),
        layouts={
            int(layer): tuple(
                TensorLayout(_string(name), _dtype(dtype), tuple(map(_count, shape)))
                for name, dtype, shape in tensors
            )
            for layer, tensors in document["layouts"].items()
        },
        dense=tuple(_parse_dense(row) for row in document["dense"]),
    )


def _parse_dense(row: Any) -> DenseTensor:
    name, dtype, shape, file, offset, length, checksum = row
    return DenseTensor(
        name=_string(name),
        dtype=_dtype(dtype),
        shape=tuple(map(_count, shape)),
        file=_string(file),
        offset_bytes=_count(offset),
        length_bytes=_count(length),
        checksum=_count(checksum),
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is not a count")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _path(value: Any) -> str:
    if b"\0" in os.fsencode(_string(value)):
        raise ValueError(f"{value!r} is not a path")
    return str(value)


def _dtype(value: Any) -> str:
    if value not in DTYPE_BYTES:
        raise ValueError(f"{value!r} is not a dtype we know")
    return str(value)


# --- what must add up -----------------------------------------------------------------------------


def _check(manifest: Manifest) -> None:
    spec = manifest.spec
    if not spec.moe_layers or list(spec.moe_layers) != sorted(spec.layouts):
        raise errors.ManifestInvalid("its MoE layers and layouts do not agree")
    if not 0 < spec.top_k <= spec.num_experts <= 1 << 16:
        raise errors.ManifestInvalid(f"top_k {spec.top_k} of {spec.num_experts} experts")
    if len(manifest.records) != spec.num_experts_total:
        raise errors.ManifestInvalid(
            f"it has {len(manifest.records)} experts, the model {spec.num_experts_total}"
        )
    for record in manifest.records.values():
        for problem in _record_problems(record, manifest):
            raise errors.ManifestInvalid(f"expert {record.key}: {problem}")
    for tensor in spec.dense:
        _check_dense(tensor, manifest)


def _check_dense(tensor: DenseTensor, manifest: Manifest) -> None:
    end_bytes = tensor.offset_bytes + tensor.length_bytes
    if end_bytes > resolve_name(manifest, tensor.file).size_bytes:
        raise errors.ManifestInvalid(f"{tensor.name} reaches beyond {tensor.file}")
    if tensor.length_bytes != prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]:
        raise errors.ManifestInvalid(f"{tensor.name} has the wrong size")


def resolve_name(manifest: Manifest, name: str) -> SourceFile:
    """The source file of that name. Raises ManifestInvalid."""
    for source in manifest.files:
        if source.path == name:
            return source
    raise errors.ManifestInvalid(f"file {name!r} is not among its files")


def _record_problems(record: ExpertRecord, manifest: Manifest) -> Iterator[str]:
    if not manifest.spec.contains(record.key):
        yield "the model has no such expert"
        return
    if not record.extents:
        yield "it has no extents"
        return
    layout = manifest.spec.layouts[record.key.layer]
    if len(record.tensor_offsets) != len(layout):
        yield f"{len(record.tensor_offsets)} tensors, its layer has {len(layout)}"
        return
    if record.payload_bytes != manifest.spec.expert_bytes(record.key.layer):
        yield "its extents and its tensors differ in size"
    yield from _extent_problems(record, manifest)
    yield from _tensor_problems(record, layout)


def _tensor_problems(record: ExpertRecord, layout: Sequence[TensorLayout]) -> Iterator[str]:
    """Each tensor lies aligned in bytes that are read, and no two share any."""
    runs = _runs((e.place_bytes, e.length_bytes) for e in record.extents)
    free_from = 0
    for offset, tensor in sorted(zip(record.tensor_offsets, layout, strict=True), key=_offset):
        end = offset + tensor.length_bytes
        if offset % TENSOR_ALIGN_BYTES or offset < free_from:
            yield f"tensor {tensor.name} is not aligned, or overlaps another"
        if not any(start <= offset and end <= stop for start, stop in runs):
            yield f"tensor {tensor.name} lies where nothing is read"
        free_from = end


def _offset(placed: tuple[int, TensorLayout]) -> int:
    return placed[0]


def _runs(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, stop) of what (start, length) pieces in ascending order cover without a gap."""
    runs: list[tuple[int, int]] = []
    for start, length in pieces:
        follows = bool(runs) and runs[-1][1] == start
        runs.append((runs.pop()[0] if follows else start, start + length))
    return runs


def _extent_problems(record: ExpertRecord, manifest: Manifest) -> Iterator[str]:
    free_from = 0
    for read in plan_reads(record.extents):
        extent = read.extent
        if extent.file >= len(manifest.files):
            yield f"file number {extent.file} of {len(manifest.files)}"
            return
        source = manifest.files[extent.file]
        if (
            extent.length_bytes == 0
            or extent.offset_bytes + extent.length_bytes > source.size_bytes
        ):
            yield f"an extent reaches beyond {source.path}"
        if not free_from <= extent.place_bytes <= read.arrived_bytes:
            yield "an extent's place overlaps another's"
        free_from = extent.place_bytes + extent.length_bytes
