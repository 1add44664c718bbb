"""The shared-memory segment as both sides see it: header, generation table, slots.

    offset 0       header (one page): magic, version, most_parts, epoch, slot_bytes, num_slots
    offset 4096    generations, uint64 little endian: most_parts of slot 0, of slot 1, ...
    header_bytes   slot 0, slot 1, ... each slot_bytes long, page aligned

A slot holds one record, or is divided into equal parts that hold one smaller record each. The store
writes, nodes map read-only. The generation of a part, or of a whole slot (part 0), changes before
its bytes do, so a reader that finds the generation it was lent, before and after, has read what it
was lent.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from proto import errors

PAGE_BYTES = 4096
TENSOR_ALIGN_BYTES = 64

_MAGIC = b"FLASHMOE"
_VERSION = 2
_HEADER = struct.Struct("<8sIIQQQ")
_GENERATION = struct.Struct("<Q")
_MAX_SLOTS = 1 << 24


def align_up(value: int, to: int = PAGE_BYTES) -> int:
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """Where everything lies in a segment of `num_slots` slots of `slot_bytes` each.

    most_parts: that a slot is ever divided into; 1: none is
    """

    num_slots: int
    slot_bytes: int
    most_parts: int = 1

    @property
    def header_bytes(self) -> int:
        return PAGE_BYTES + align_up(self.num_slots * self.most_parts * _GENERATION.size)

    @property
    def segment_bytes(self) -> int:
        return self.header_bytes + self.num_slots * self.slot_bytes

    def slot_offset_bytes(self, slot: int) -> int:
        return self.header_bytes + slot * self.slot_bytes

    def part_bytes(self, num_parts: int) -> int:
        """Of one of the parts of a divided slot: whole pages."""
        return self.slot_bytes // num_parts // PAGE_BYTES * PAGE_BYTES


def write_header(buffer: memoryview, layout: SegmentLayout, epoch: int) -> None:
    """Format the header of a segment; generations keep what they were."""
    sizes = layout.most_parts, epoch, layout.slot_bytes, layout.num_slots
    _HEADER.pack_into(buffer, 0, _MAGIC, _VERSION, *sizes)


def read_header(buffer: memoryview, file_bytes: int) -> tuple[SegmentLayout, int]:
    """Layout and epoch of a mapped segment file of `file_bytes`.

    Raises SegmentInvalid when it is not ours, of another version, or sizes do not add up.
    """
    if len(buffer) < _HEADER.size:
        raise errors.SegmentInvalid(f"segment has {len(buffer)} bytes, no room for its header")
    magic, version, most_parts, epoch, slot_bytes, num_slots = _HEADER.unpack_from(buffer, 0)
    if magic != _MAGIC:
        raise errors.SegmentInvalid("not a FlashMoE segment: wrong magic")
    if version != _VERSION:
        raise errors.SegmentInvalid(f"segment has version {version}, we speak {_VERSION}")
    if not 0 < num_slots <= _MAX_SLOTS or slot_bytes == 0 or slot_bytes % PAGE_BYTES:
        raise errors.SegmentInvalid(f"segment claims {num_slots} slots of {slot_bytes} bytes")
    if not 0 < most_parts <= slot_bytes // PAGE_BYTES:
        raise errors.SegmentInvalid(f"segment claims {most_parts} parts of {slot_bytes} bytes")
    layout = SegmentLayout(num_slots, slot_bytes, most_parts)
    if layout.segment_bytes > file_bytes:
        raise errors.SegmentInvalid(
            f"segment file has {file_bytes} bytes, its header claims {layout.segment_bytes}"
        )
    return layout, epoch


def read_generation(buffer: memoryview, layout: SegmentLayout, slot: int, part: int) -> int:
    offset_bytes = _generation_offset(layout, slot, part)
    generation: int = _GENERATION.unpack_from(buffer, offset_bytes)[0]
    return generation


def write_generation(
    buffer: memoryview, layout: SegmentLayout, slot: int, part: int, generation: int
) -> None:
    _GENERATION.pack_into(buffer, _generation_offset(layout, slot, part), generation)


def _generation_offset(layout: SegmentLayout, slot: int, part: int) -> int:
    return PAGE_BYTES + (slot * layout.most_parts + part) * _GENERATION.size
