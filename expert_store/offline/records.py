"""Writes the records of a checkpoint's experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import xxhash

from expert_store.manifest.durable import write_all
from expert_store.manifest.extents import ExpertRecord, Extent
from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.formats.encoder import Encoder, describe_variant
from expert_store.offline.formats.weight_source import WeightSource
from expert_store.offline.record_file import RecordFile
from proto.expert import RecordKey, TensorLayout, Variant
from proto.shm import TENSOR_ALIGN_BYTES, align_up


@dataclass(frozen=True)
class RecordWriter:
    """What all records have in common. encoders: by variant, in the order they are written in"""

    architecture: Architecture
    encoders: Mapping[str, Encoder]
    source: WeightSource

    @property
    def variants(self) -> dict[str, Variant]:
        return {
            name: describe_variant(self.architecture, encoder)
            for name, encoder in self.encoders.items()
        }

    @property
    def total_bytes(self) -> int:
        """Of all records, aligned."""
        layouts = [layout for each in self.variants.values() for layout in each.layouts.values()]
        ends = [place_tensors(layout)[1] for layout in layouts]
        return self.architecture.num_experts * sum(map(align_up, ends))

    def write(self, file: RecordFile) -> dict[RecordKey, ExpertRecord]:
        """Every record that the file does not have yet.

        Raises ManifestInvalid for a damaged source, OSError for a full disk.
        """
        records: dict[RecordKey, ExpertRecord] = {}
        variants = self.variants
        for name, expert in product(variants, self.architecture.keys):
            key, layout = RecordKey(expert, name), variants[name].layouts[expert.layer]
            offsets, end_bytes = place_tensors(layout)
            start_bytes, checksum = file.add(
                key, end_bytes, partial(self._write_one, key=key, offsets=offsets)
            )
            extents = _extents(layout, offsets, start_bytes)
            records[key] = ExpertRecord(key, extents, offsets, checksum)
        return records

    def _write_one(
        self, descriptor: int, start_bytes: int, key: RecordKey, offsets: Sequence[int]
    ) -> int:
        """Returns the checksum."""
        digest, cursor = xxhash.xxh3_64(), start_bytes
        tensors = (
            tensor
            for parameter in self.architecture.layers[key.expert.layer]
            for tensor in self.encoders[key.variant].encode(
                parameter, key.expert.expert, self.source
            )
        )
        for offset, chunks in zip(offsets, tensors, strict=True):
            cursor += write_all(descriptor, bytes(start_bytes + offset - cursor), cursor)
            for chunk in chunks:
                digest.update(chunk)
                cursor += write_all(descriptor, chunk, cursor)
        return digest.intdigest()


def place_tensors(layout: Sequence[TensorLayout]) -> tuple[tuple[int, ...], int]:
    """Offsets of an expert's tensors in its record, and the payload's end."""
    offsets, cursor = [], 0
    for tensor in layout:
        cursor = align_up(cursor, TENSOR_ALIGN_BYTES)
        offsets.append(cursor)
        cursor += tensor.length_bytes
    return tuple(offsets), cursor


def _extents(
    layout: Sequence[TensorLayout], offsets: Sequence[int], start_bytes: int
) -> tuple[Extent, ...]:
    """One extent where tensors fill the record without gaps, else one read per run between gaps."""
    extents: list[Extent] = []
    for offset, tensor in zip(offsets, layout, strict=True):
        length = tensor.length_bytes
        if extents and extents[-1].place_bytes + extents[-1].length_bytes == offset:
            extents[-1] = replace(extents[-1], length_bytes=extents[-1].length_bytes + length)
        else:
            extents.append(Extent(0, start_bytes + offset, length, offset))
    return tuple(extents)
