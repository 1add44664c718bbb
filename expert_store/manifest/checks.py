"""What must add up in a manifest: layers, sizes, extents within their files, tensors within what is
read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from expert_store.manifest.extents import ExpertRecord, plan_reads, slot_bytes_needed
from expert_store.manifest.share import Share
from expert_store.manifest.sources import SourceFile, resolve_name
from proto import errors
from proto.expert import (
    DTYPE_BYTES,
    EXACT_VARIANT,
    DenseTensor,
    ModelSpec,
    RecordKey,
    TensorLayout,
)
from proto.shm import TENSOR_ALIGN_BYTES
from proto.weight_format import INT4_GROUPS


def check(
    spec: ModelSpec,
    files: Sequence[SourceFile],
    records: Mapping[RecordKey, ExpertRecord],
    share: Share | None = None,
) -> None:
    """Raises ManifestInvalid naming the first thing that does not add up."""
    if not 0 < spec.top_k <= spec.num_experts <= 1 << 16:
        raise errors.ManifestInvalid(f"top_k {spec.top_k} of {spec.num_experts} experts")
    if EXACT_VARIANT in spec.variants:
        raise errors.ManifestInvalid(f"it has a second variant named {EXACT_VARIANT!r}")
    for name in (EXACT_VARIANT, *spec.variants):
        _check_variant(spec, name)
    if share is None:
        _check_whole(spec, records)
    else:
        _check_share(spec, share, records)
    for record in records.values():
        for problem in _record_problems(record, spec, files):
            raise errors.ManifestInvalid(f"expert {record.key}: {problem}")
    _check_sizes(records)
    for tensor in spec.dense:
        _check_dense(tensor, files)


def _check_whole(spec: ModelSpec, records: Mapping[RecordKey, ExpertRecord]) -> None:
    """Each variant has a record of every expert."""
    counts = Counter(key.variant for key in records)
    for name in (EXACT_VARIANT, *spec.variants):
        if counts[name] != spec.num_experts_total:
            raise errors.ManifestInvalid(
                f"{_whose(name)}it has {counts[name]} experts, the model {spec.num_experts_total}"
            )


def _check_share(spec: ModelSpec, share: Share, records: Mapping[RecordKey, ExpertRecord]) -> None:
    """Each variant has a record of every expert of the share, and of no other."""
    experts = share.experts(spec)
    for name in (EXACT_VARIANT, *spec.variants):
        found = {key.expert for key in records if key.variant == name}
        for key in sorted(experts ^ found)[:1]:
            problem = "lacks" if key in experts else "should not have"
            raise errors.ManifestInvalid(f"{_whose(name)}{share} {problem} expert {key}")


def _whose(name: str) -> str:
    return "" if name == EXACT_VARIANT else f"variant {name!r}: "


def _check_variant(spec: ModelSpec, name: str) -> None:
    variant, whose = spec.variant(name), _whose(name)
    if not spec.moe_layers or list(spec.moe_layers) != sorted(variant.layouts):
        raise errors.ManifestInvalid(f"{whose}its MoE layers and layouts do not agree")
    if variant.weight_format.group not in (0, *INT4_GROUPS):
        group = variant.weight_format.group
        raise errors.ManifestInvalid(f"{whose}weight format with groups of {group}")


def _check_sizes(records: Mapping[RecordKey, ExpertRecord]) -> None:
    """A slot is as large as the largest exact record, and has to hold any other variant's."""
    sizes = {key: slot_bytes_needed(record.extents) for key, record in records.items()}
    largest = max(size for key, size in sizes.items() if key.variant == EXACT_VARIANT)
    for key, size in sizes.items():
        if size > largest:
            raise errors.ManifestInvalid(f"expert {key}: larger than every exact record")


def _check_dense(tensor: DenseTensor, files: Sequence[SourceFile]) -> None:
    end_bytes = tensor.offset_bytes + tensor.length_bytes
    if end_bytes > resolve_name(files, tensor.file).size_bytes:
        raise errors.ManifestInvalid(f"{tensor.name} reaches beyond {tensor.file}")
    if tensor.length_bytes != prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]:
        raise errors.ManifestInvalid(f"{tensor.name} has the wrong size")


def _record_problems(
    record: ExpertRecord, spec: ModelSpec, files: Sequence[SourceFile]
) -> Iterator[str]:
    expert, name = record.key.expert, record.key.variant
    if not spec.contains(expert):
        yield "the model has no such expert"
        return
    if name != EXACT_VARIANT and name not in spec.variants:
        yield f"the store has no variant {name!r}"
        return
    if not record.extents:
        yield "it has no extents"
        return
    layout = spec.variant(name).layouts[expert.layer]
    if len(record.tensor_offsets) != len(layout):
        yield f"{len(record.tensor_offsets)} tensors, its layer has {len(layout)}"
        return
    if record.payload_bytes != spec.variant(name).expert_bytes(expert.layer):
        yield "its extents and its tensors differ in size"
    yield from _extent_problems(record, files)
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


def _extent_problems(record: ExpertRecord, files: Sequence[SourceFile]) -> Iterator[str]:
    free_from = 0
    for read in plan_reads(record.extents):
        extent = read.extent
        if extent.file >= len(files):
            yield f"file number {extent.file} of {len(files)}"
            return
        source = files[extent.file]
        if (
            extent.length_bytes == 0
            or extent.offset_bytes + extent.length_bytes > source.size_bytes
        ):
            yield f"an extent reaches beyond {source.path}"
        if not free_from <= extent.place_bytes <= read.arrived_bytes:
            yield "an extent's place overlaps another's"
        free_from = extent.place_bytes + extent.length_bytes
