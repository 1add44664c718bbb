"""Where an expert's bytes lie on disk, and where in a slot they belong.

A record is a list of extents. An extent is read page-aligned into the slot at its *landing*, and
moved down to its *place* when the two differ, so that every tensor ends up whole and 64-byte
aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proto.expert import RecordKey
from proto.shm import PAGE_BYTES, align_up


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

    key: RecordKey
    extents: tuple[Extent, ...]
    tensor_offsets: tuple[int, ...]
    checksum: int

    @property
    def payload_bytes(self) -> int:
        return sum(extent.length_bytes for extent in self.extents)
