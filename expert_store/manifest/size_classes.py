"""How many records of each variant a slot holds, and what one of them counts in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from expert_store.manifest.extents import ExpertRecord, slot_bytes_needed
from proto.shm import SegmentLayout


@dataclass(frozen=True)
class SizeClasses:
    """slot_bytes: of the largest record, in whole pages

    num_parts: by variant, how many of its records one slot holds
    """

    slot_bytes: int
    num_parts: dict[str, int]

    @classmethod
    def of(cls, records: Iterable[ExpertRecord]) -> SizeClasses:
        largest: dict[str, int] = {}
        for record in records:
            needed, variant = slot_bytes_needed(record.extents), record.key.variant
            largest[variant] = max(needed, largest.get(variant, 0))
        slot_bytes = max(largest.values())
        return cls(slot_bytes, {name: slot_bytes // size for name, size in largest.items()})

    @property
    def lease_bytes(self) -> dict[str, int]:
        """By variant, what a lease counts against a quota: a slot's share, in whole bytes."""
        return {name: self.slot_bytes // number for name, number in self.num_parts.items()}

    def segment_layout(self, num_slots: int) -> SegmentLayout:
        return SegmentLayout(num_slots, self.slot_bytes, max(self.num_parts.values()))
