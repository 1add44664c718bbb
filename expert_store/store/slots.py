"""Which slot holds which expert, and who may read it: free, filling, leased or reclaimable."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from expert_store.store.segment import Segment
from proto.expert import RecordKey


@dataclass(eq=False)
class Slot:
    """One equal piece of the segment, and what it holds once sealed.

    is_speculative: it was filled because somebody may want it, and nobody has asked for it yet
    """

    number: int
    generation: int = 0
    key: RecordKey | None = None
    is_speculative: bool = False


class SlotPool:
    """Every slot of a segment. A reclaimable one keeps its expert until it is refilled, oldest
    release first.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._free = [Slot(number) for number in reversed(range(segment.layout.num_slots))]
        self._filling: set[Slot] = set()
        self._leases: Counter[Slot] = Counter()
        self._reclaimable: OrderedDict[Slot, None] = OrderedDict()
        self._by_key: dict[RecordKey, Slot] = {}

    def find(self, key: RecordKey) -> Slot | None:
        """The sealed slot that holds `key`, if any."""
        return self._by_key.get(key)

    def lease(self, slot: Slot) -> None:
        self._reclaimable.pop(slot, None)
        self._leases[slot] += 1

    def release(self, slot: Slot) -> None:
        """One lease less; the last one makes the slot reclaimable."""
        self._leases[slot] -= 1
        if self._leases[slot] == 0:
            del self._leases[slot]
            self._reclaimable[slot] = None

    def next_to_fill(self) -> Slot | None:
        """The slot that `fill` would take; None while every slot is leased or filling."""
        if self._free:
            return self._free[-1]
        return next(iter(self._reclaimable), None)

    def fill(self, slot: Slot) -> None:
        """Take a slot to be written to: what it held is gone. To be sealed or given back."""
        if slot.key is None:
            self._free.remove(slot)
        else:
            del self._reclaimable[slot]
            del self._by_key[slot.key]
            slot.key = None
        slot.generation = self._segment.bump_generation(slot.number)
        slot.is_speculative = False
        self._filling.add(slot)

    def seal(self, slot: Slot, key: RecordKey) -> None:
        """The slot holds `key` now, readable until it is refilled."""
        self._filling.remove(slot)
        slot.key = key
        self._by_key[key] = slot
        self._reclaimable[slot] = None

    def give_back(self, slot: Slot) -> None:
        """A filling slot that will not be sealed."""
        self._filling.remove(slot)
        self._free.append(slot)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def resident(self) -> list[RecordKey]:
        return list(self._by_key)

    def leased(self) -> list[RecordKey]:
        return [slot.key for slot in self._leases if slot.key is not None]

    def counts(self) -> dict[str, int]:
        """Slots by state. When nobody holds a session, filling and leased are 0."""
        return {
            "free": len(self._free),
            "filling": len(self._filling),
            "leased": len(self._leases),
            "reclaimable": len(self._reclaimable),
        }
