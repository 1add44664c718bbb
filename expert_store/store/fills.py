"""Records under way into memory, and whose turn at the device is next: demand before prefetch,
piece by piece.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

from expert_store.io.assembly import Assembly
from expert_store.manifest.extents import ExpertRecord
from expert_store.store.slots import Slot
from proto import errors

Owner = TypeVar("Owner")


class Priority(IntEnum):
    """Who waits. A lower number goes first."""

    DEMAND = 0
    PREFETCH = 1
    REFILL = 2


@dataclass(eq=False)
class Fill(Generic[Owner]):
    """One record on its way. Single flight: others that want it meanwhile wait for this one.

    waiters: sessions that asked for it, each with whom to tell
    wishers: sessions that would like it to be there
    slot, view, assembly: once its first piece is asked of the device
    """

    record: ExpertRecord
    priority: Priority
    waiters: list[tuple[Owner, Callable[..., None]]] = field(default_factory=list)
    wishers: set[Owner] = field(default_factory=set)
    slot: Slot | None = None
    view: memoryview | None = None
    assembly: Assembly | None = None
    num_issued: int = 0
    num_in_flight: int = 0
    is_withdrawn: bool = False
    error: errors.FlashMoEError | None = None
    start_ns: int = 0
    arrived_ns: int = 0

    @property
    def is_issued(self) -> bool:
        """Nothing more of it will be asked of the device."""
        if self.is_withdrawn or self.error is not None:
            return True
        return self.assembly is not None and self.num_issued == len(self.assembly.pieces)

    @property
    def is_over(self) -> bool:
        """Given up, and no reader writes into its slot any more."""
        return (self.is_withdrawn or self.error is not None) and self.num_in_flight == 0


class FillQueue(Generic[Owner]):
    """In the order of priority, then of arrival. Guarded by its owner's lock."""

    def __init__(self) -> None:
        self._heap: list[tuple[Priority, int, Fill[Owner]]] = []
        self._order = itertools.count()

    def add(self, fill: Fill[Owner]) -> None:
        """Also after its priority changed: what it had before no longer counts."""
        heapq.heappush(self._heap, (fill.priority, next(self._order), fill))

    def first(self) -> Fill[Owner] | None:
        """Whose piece is read next."""
        while self._heap:
            priority, _, fill = self._heap[0]
            if priority is fill.priority and not fill.is_issued:
                return fill
            heapq.heappop(self._heap)
        return None

    def first_begun(self) -> Fill[Owner] | None:
        """Whose piece is read next of those that have a slot."""
        begun = [
            (priority, number, fill)
            for priority, number, fill in self._heap
            if priority is fill.priority and fill.slot and not fill.is_issued
        ]
        return min(begun)[2] if begun else None
