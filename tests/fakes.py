"""One fake per boundary; tests/contract checks each against the real thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from compute_node.cache.capacity import Capacity
from compute_node.store.memory import Borrowed
from compute_node.store.session import SessionLost
from proto import errors
from proto.expert import EXACT_VARIANT, RecordKey

EXPERT_BYTES = 100


def make_capacity(
    slots: int, moe_layers: tuple[int, ...], top_k: int, pooled: bool, num_parts: int = 1
) -> Capacity:
    """Of as many experts of `EXPERT_BYTES`."""
    return Capacity(slots * EXPERT_BYTES, EXPERT_BYTES, moe_layers, top_k, pooled, num_parts)


class FakeLender:
    """A store client without a store. Small records lie where the real one lays them: beside each
    other in a slot that is in use, before another is divided.

    damaged: experts that cannot be lent
    """

    def __init__(
        self,
        quota_slots: int = 1 << 20,
        bytes_per_expert: int = EXPERT_BYTES,
        num_parts: int = 1,
    ) -> None:
        self.held: dict[RecordKey, Borrowed] = {}
        self.in_memory: set[RecordKey] = set()
        self.damaged: set[RecordKey] = set()
        self.exchanges: list[tuple[list[RecordKey], list[RecordKey]]] = []
        self.prefetched: list[RecordKey] = []
        self.withdrawn: list[RecordKey] = []
        self.break_next = False
        self.num_opened = 0
        self._quota_slots = quota_slots
        self._num_parts = num_parts
        self._bytes = bytes_per_expert
        self._open = False
        self._generation = 0

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def lends_copies(self) -> bool:
        return False

    def open(self, check: Callable[[], None] = lambda: None) -> None:
        check()
        self.held.clear()
        self._open = True
        self.num_opened += 1

    def borrow(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        check: Callable[[], None] = lambda: None,
        prefetches: Sequence[RecordKey] = (),
        withdrawals: Sequence[RecordKey] = (),
    ) -> FakeArrivals:
        if self.break_next or not self._open:
            self.break_next = False
            self.abort()
            raise SessionLost("broken on purpose")
        self.prefetched += prefetches
        self.withdrawn += withdrawals
        if releases or acquires:
            self.exchanges.append((list(releases), list(acquires)))
        for key in releases:
            del self.held[key]
        assert not self.held.keys() & set(acquires), "asked for what it holds"
        arrivals = [self._lend(key) for key in acquires if key not in self.damaged]
        assert len({held.slot for held in self.held.values()}) <= self._quota_slots
        return self._come(arrivals, [key for key in acquires if key in self.damaged], check)

    def exchange(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        check: Callable[[], None] = lambda: None,
    ) -> list[Borrowed]:
        try:
            return [arrival for part in self.borrow(releases, acquires, check) for arrival in part]
        except (errors.Cancelled, errors.DeadlineExceeded):
            self.abort()
            raise

    def _come(
        self, arrivals: list[Borrowed], damaged: list[RecordKey], check: Callable[[], None]
    ) -> FakeArrivals:
        """What is in memory first, then one after another; damage last."""
        in_memory = [arrival for arrival in arrivals if arrival.bytes_read == 0]
        parts = [in_memory] if in_memory else []
        parts += [[arrival] for arrival in arrivals if arrival.bytes_read]
        return FakeArrivals(self, parts, damaged, check)

    def resident(self) -> list[RecordKey]:
        return list(self.in_memory)

    def is_current(self, borrowed: Borrowed) -> bool:
        return self.held.get(borrowed.record) is borrowed

    def abort(self) -> None:
        self._open = False
        self.held.clear()

    def _lend(self, key: RecordKey) -> Borrowed:
        self._generation += 1
        is_small = key.variant != EXACT_VARIANT
        size_bytes = self._bytes // self._num_parts if is_small else self._bytes
        bytes_read = 0 if key in self.in_memory else size_bytes
        slot = self._slot_beside() if is_small else self._free_slot()
        place = (slot, 0, self._generation, size_bytes)
        self.held[key] = Borrowed(key.expert, *place, {}, bytes_read, variant=key.variant)
        self.in_memory.add(key)
        return self.held[key]

    def _free_slot(self) -> int:
        used = {held.slot for held in self.held.values()}
        return next(slot for slot in range(len(used) + 1) if slot not in used)

    def _slot_beside(self) -> int:
        """Of a small record."""
        used = Counter(held.slot for held in self.held.values() if not held.is_exact)
        free = (slot for slot, count in used.items() if count < self._num_parts)
        return next(free, self._free_slot())


class FakeArrivals:
    """Of one loan; goes on after what `check` raised."""

    def __init__(
        self,
        lender: FakeLender,
        parts: list[list[Borrowed]],
        damaged: list[RecordKey],
        check: Callable[[], None],
    ) -> None:
        self._lender, self._parts, self._damaged, self._check = lender, parts, damaged, check

    def __iter__(self) -> Iterator[list[Borrowed]]:
        return self

    def is_ready(self) -> bool:
        return True

    def __next__(self) -> list[Borrowed]:
        if not self._parts and not self._damaged:
            raise StopIteration
        try:
            self._check()
        except (errors.Cancelled, errors.DeadlineExceeded):
            raise
        except BaseException:
            self._lender.abort()
            raise
        if self._parts:
            return self._parts.pop(0)
        damaged, self._damaged = self._damaged, []
        raise errors.ExpertDamaged(f"{damaged[0]} is damaged")
