"""How many of the store's slots leases bind, where several small records share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from compute_node.store.memory import Borrowed
from proto.expert import EXACT_VARIANT, RecordKey


@dataclass(frozen=True)
class Coming:
    """Records that are on their way, exact and small ones."""

    num_exact: int = 0
    num_small: int = 0

    @classmethod
    def of(cls, records: Iterable[RecordKey]) -> Coming:
        counts = Counter(record.variant == EXACT_VARIANT for record in records)
        return cls(counts[True], counts[False])


@dataclass
class Occupancy:
    """Of some of a node's leases. An exact record fills a slot; the store fills the parts of
    divided slots that are in use before it divides another.

    num_parts: small records that one slot holds; 1: each takes as much room as an exact one
    parts:     how many of them are held in each divided slot, by its number
    """

    num_parts: int = 1
    num_exact: int = 0
    parts: Counter[int] = field(default_factory=Counter)

    def add(self, held: Borrowed) -> None:
        if held.is_exact or self.num_parts == 1:
            self.num_exact += 1
        else:
            self.parts[held.slot] += 1

    def remove(self, held: Borrowed) -> None:
        if held.is_exact or self.num_parts == 1:
            self.num_exact -= 1
            return
        self.parts[held.slot] -= 1
        if not self.parts[held.slot]:
            del self.parts[held.slot]

    def slots_with(self, coming: Coming) -> int:
        """Bound once these have come as well."""
        held = self.parts.total()
        num_free = self.num_parts * len(self.parts) - held
        num_divided = len(self.parts) - (-max(0, coming.num_small - num_free) // self.num_parts)
        return self.num_exact + coming.num_exact + num_divided

    def copy(self) -> Occupancy:
        return Occupancy(self.num_parts, self.num_exact, self.parts.copy())
