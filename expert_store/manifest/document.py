"""A manifest as a JSON document: signed, versioned, and every value of it typed when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from expert_store.manifest.extents import ExpertRecord, Extent
from expert_store.manifest.share import Share
from expert_store.manifest.sizing import Sizing
from expert_store.manifest.sources import SourceFile
from proto import errors
from proto.expert import (
    DTYPE_BYTES,
    EXACT_VARIANT,
    DenseTensor,
    ExpertKey,
    Layouts,
    ModelSpec,
    RecordKey,
    TensorLayout,
    Variant,
)
from proto.weight_format import EXACT, NAMES, WeightFormat

FORMAT_VERSION = 3
_SHARE_VERSION = 4
# 1 knew no weight format: its experts are exact. 2 knew no variants but the exact one. 4 is that of
# shares alone: who knows only whole stores refuses them by their version.
_VERSIONS = (1, 2, FORMAT_VERSION, _SHARE_VERSION)


def encode(
    *,
    format: str,
    spec: ModelSpec,
    sizing: Sizing,
    source_root: str,
    files: Iterable[SourceFile],
    records: Mapping[RecordKey, ExpertRecord],
    share: Share | None,
) -> dict[str, Any]:
    """The signed document of a manifest with these fields."""
    document = {
        "version": FORMAT_VERSION,
        "format": format,
        "source_root": source_root,
        "spec": _spec_document(spec),
        "sizing": vars(sizing),
        "files": [file.row() for file in files],
        "experts": [_record_row(record) for record in records.values()],
    }
    if share is not None:
        document["version"] = _SHARE_VERSION
        document["share"] = [share.owner, share.owners, share.copies]
    return signed(document)


def fingerprint(format: str, spec: ModelSpec, records: Mapping[RecordKey, ExpertRecord]) -> str:
    """Of a model's content: names, layouts and checksums, not where files lie."""
    content = {
        "format": format,
        "spec": _spec_document(spec) | {"fingerprint": ""},
        "checksums": [[str(key), record.checksum] for key, record in records.items()],
    }
    return _digest(content)[:32]


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the digest of everything else in it."""
    body = {name: value for name, value in document.items() if name != "digest"}
    return body | {"digest": _digest(body)}


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _record_row(record: ExpertRecord) -> list[Any]:
    extents = [[e.file, e.offset_bytes, e.length_bytes, e.place_bytes] for e in record.extents]
    key = record.key.expert
    row = [key.layer, key.expert, extents, list(record.tensor_offsets), f"{record.checksum:016x}"]
    return row if record.key.variant == EXACT_VARIANT else [*row, record.key.variant]


def _spec_document(spec: ModelSpec) -> dict[str, Any]:
    document = {
        "fingerprint": spec.fingerprint,
        "model_type": spec.model_type,
        "moe_layers": list(spec.moe_layers),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layouts": _layout_rows(spec.layouts),
        "dense": [
            [t.name, t.dtype, list(t.shape), t.file, t.offset_bytes, t.length_bytes, t.checksum]
            for t in spec.dense
        ],
    }
    if spec.weight_format != EXACT:  # unsaid, so that exact stores keep their fingerprints
        document["weight_format"] = _format_row(spec.weight_format)
    if spec.variants:  # unsaid for the same reason
        document["variants"] = {
            name: [_format_row(variant.weight_format), _layout_rows(variant.layouts)]
            for name, variant in spec.variants.items()
        }
    return document


def _layout_rows(layouts: Layouts) -> dict[str, Any]:
    return {
        str(layer): [[t.name, t.dtype, list(t.shape)] for t in tensors]
        for layer, tensors in layouts.items()
    }


def _format_row(weight_format: WeightFormat) -> list[Any]:
    return [weight_format.name, weight_format.group, weight_format.layout, weight_format.lossy]


def decode(document: Any) -> dict[str, Any]:
    """What `encode` was given.

    Raises ManifestInvalid for another version or a changed document, and whatever Python raises for
    a value of the wrong kind: KeyError, TypeError, ValueError, IndexError, AttributeError,
    OverflowError, RecursionError.
    """
    if document["version"] not in _VERSIONS:
        raise errors.ManifestInvalid(
            f"format version {document['version']}, this program reads up to {_VERSIONS[-1]}: "
            "index again"
        )
    if document["digest"] != signed(document)["digest"]:
        raise errors.ManifestInvalid("its digest differs, so it was changed: index again")
    return {
        "format": _string(document["format"]),
        "spec": _parse_spec(document["spec"]),
        "sizing": Sizing(**{name: _count(value) for name, value in document["sizing"].items()}),
        "source_root": _path(document["source_root"]),
        "files": tuple(
            SourceFile(_path(path), _count(size), _count(mtime), _string(digest))
            for path, size, mtime, digest in document["files"]
        ),
        "records": {record.key: record for record in map(_parse_record, document["experts"])},
        "share": _parse_share(document),
    }


def _parse_share(document: Any) -> Share | None:
    if document["version"] != _SHARE_VERSION:
        return None
    owner, owners, copies = map(_count, document["share"])
    return Share(owner, owners, copies)


def _parse_record(row: Any) -> ExpertRecord:
    layer, expert, extents, offsets, checksum, *rest = row
    (variant,) = rest or [EXACT_VARIANT]
    return ExpertRecord(
        key=RecordKey(ExpertKey(_count(layer), _count(expert)), _string(variant)),
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
        layouts=_parse_layouts(document["layouts"]),
        dense=tuple(_parse_dense(row) for row in document["dense"]),
        weight_format=_parse_format(document.get("weight_format")),
        variants={
            name: Variant(_parse_format(weight_format), _parse_layouts(layouts))
            for name, (weight_format, layouts) in document.get("variants", {}).items()
        },
    )


def _parse_layouts(document: Any) -> Layouts:
    return {
        int(layer): tuple(
            TensorLayout(_string(name), _dtype(dtype), tuple(map(_count, shape)))
            for name, dtype, shape in tensors
        )
        for layer, tensors in document.items()
    }


def _parse_format(row: Any) -> WeightFormat:
    if row is None:
        return EXACT
    name, group, layout, lossy = row
    if name not in NAMES:
        raise errors.ManifestInvalid(
            f"weight format {name!r}, this program knows {', '.join(NAMES)}: update it"
        )
    if not isinstance(lossy, bool):
        raise TypeError(f"{lossy!r} is neither true nor false")
    return WeightFormat(name, _count(group), _string(layout), lossy)


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
