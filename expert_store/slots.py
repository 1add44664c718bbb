"""Which slot holds which expert, and who may read it: free, filling, leased or reclaimable."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from expert_store.segment import Segment
from proto import errors
from proto.expert import ExpertKey


@dataclass(eq=False)
class Slot:
    """One equal piece of the segment, and what it holds once sealed."""

    number: int
    generation: int = 0
    key: ExpertKey | None = None


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
        self._by_key: dict[ExpertKey, Slot] = {}

    def find(self, key: ExpertKey) -> Slot | None:
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

    @contextmanager
    def filling(self, key: ExpertKey) -> Iterator[Slot]:
        """A slot for the block to fill: sealed on success, freed on any failure.

        Raises SlotsExhausted when every slot is leased or filling.
        """
        slot = self._take()
        slot.generation = self._segment.bump_generation(slot.number)
        self._filling.add(slot)
        try:
            yield slot
        except BaseException:
            self._filling.discard(slot)
            self._free.append(slot)
            raise
        self._filling.discard(slot)
        slot.key = key
        self._by_key[key] = slot
        self._reclaimable[slot] = None

    def resident(self) -> list[ExpertKey]:
        return list(self._by_key)

    def counts(self) -> dict[str, int]:
        """Slots by state. When nobody holds a session, filling and leased are 0."""
        return {
            "free": len(self._free),
            "filling": len(self._filling),
            "leased": len(self._leases),
            "reclaimable": len(self._reclaimable),
        }

    def _take(self) -> Slot:
        if self._free:
            return self._free.pop()
        if not self._reclaimable:
            raise errors.SlotsExhausted("every slot is leased or filling: release one, then retry")
        slot, _ = self._reclaimable.popitem(last=False)
        if slot.key is not None:
            del self._by_key[slot.key]
            slot.key = None
        return slot
