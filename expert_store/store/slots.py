"""Which record lies where, and who may read it: free, filling, leased or reclaimable.

A slot is given to one size class at a time. It holds one record of the largest class, or is divided
into equal parts, each of which holds one record of a smaller class.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from expert_store.store.segment import Segment
from proto.expert import RecordKey


@dataclass(eq=False, slots=True)
class Slot:
    """One equal piece of the segment.

    parts: what it is divided into, one if a record fills it; none while it is free
    num_filling, num_leased: of its parts
    idle_since: when the last part stopped being used, in the pool's own time
    """

    number: int
    parts: list[Part] = field(default_factory=list)
    num_filling: int = 0
    num_leased: int = 0
    idle_since: int = 0

    @property
    def is_used(self) -> bool:
        return self.num_leased > 0 or self.num_filling > 0

    @property
    def state(self) -> str:
        """Of the part that binds it most."""
        if self.num_leased:
            return "leased"
        if self.num_filling:
            return "filling"
        return "reclaimable" if self.parts else "free"


@dataclass(eq=False, slots=True)
class Part:
    """What one record lies in: the unit that is filled, sealed and lent.

    start_bytes: where it begins in the slot
    released: when it became reclaimable, in the pool's own time
    ahead_bytes: read before a session waited for the record; 0 once one acquired it
    wishers: sessions that will likely acquire the record, and have not
    is_speculative: it was filled because a session may want it, and no session has asked for it yet
    """

    slot: Slot
    size_class: SizeClass
    number: int
    start_bytes: int
    generation: int = 0
    key: RecordKey | None = None
    released: int = 0
    ahead_bytes: int = 0
    is_speculative: bool = False
    wishers: set[Hashable] = field(default_factory=set)

    @property
    def place(self) -> tuple[int, int, int]:
        """Its slot's number, and where in the slot it begins and how long it is."""
        return self.slot.number, self.start_bytes, self.size_class.part_bytes


@dataclass
class SizeClass:
    """The parts of slots that are divided alike.

    num_parts: that each of these slots is divided into
    reclaimable: oldest release first
    wished: also reclaimable, but some session will likely acquire them: last of all
    """

    num_parts: int
    part_bytes: int
    free: dict[Part, None] = field(default_factory=dict)
    reclaimable: OrderedDict[Part, None] = field(default_factory=OrderedDict)
    wished: OrderedDict[Part, None] = field(default_factory=OrderedDict)

    def beside_used(self) -> Part | None:
        """A part without a user in a slot that another part binds, a free one first."""
        if self.num_parts == 1:
            return None
        unused = itertools.chain(reversed(self.free), self.reclaimable, self.wished)
        return next((part for part in unused if part.slot.is_used), None)

    def queue_of(self, part: Part) -> OrderedDict[Part, None]:
        """Where it stands while it is reclaimable."""
        return self.wished if part.wishers else self.reclaimable


class SlotPool:
    """Every slot of a segment. A reclaimable part keeps its record until its memory is needed,
    oldest release first; one that a session wishes for goes when there is no other. A divided slot
    is free again once none of its parts holds a record.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._slots = [Slot(number) for number in range(segment.layout.num_slots)]
        self._free = self._slots[::-1]
        self._idle: OrderedDict[Slot, None] = OrderedDict()  # by idle_since
        self._idle_wished: OrderedDict[Slot, None] = OrderedDict()  # the same, with a wished part
        self._classes: dict[int, SizeClass] = {}  # by parts a slot
        self._leases: Counter[Part] = Counter()
        self._by_key: dict[RecordKey, Part] = {}
        self._time = itertools.count(1)

    def find(self, key: RecordKey) -> Part | None:
        """The sealed part that holds `key`, if any."""
        return self._by_key.get(key)

    def lease(self, part: Part) -> None:
        if part not in self._leases:
            del part.size_class.queue_of(part)[part]
            part.wishers.clear()
            self._stop_idling(part.slot)
            part.slot.num_leased += 1
        self._leases[part] += 1

    def release(self, part: Part) -> None:
        """One lease less; the last one makes the part reclaimable."""
        self._leases[part] -= 1
        if self._leases[part] == 0:
            del self._leases[part]
            part.slot.num_leased -= 1
            self._make_reclaimable(part)

    def fill(self, num_parts: int) -> tuple[Part, list[RecordKey]] | None:
        """Take a part to be written to, of a slot divided into `num_parts`; to be sealed or given
        back. What goes first is a part of such a slot that is in use, so that leases bind few
        slots; then a free part, a free slot, and whichever was not used for longer: a reclaimable
        part of such a slot, or an idle slot as a whole.

        Returns the part, and the speculative records that had to go for it unasked. None while
        leases and fills stand in every slot.
        """
        size_class = self._classes.get(num_parts) or self._add_class(num_parts)
        unused: list[RecordKey] = []
        if (beside := size_class.beside_used()) is not None:
            part, unused = beside, self._forget(beside) if beside.key else []
            size_class.free.pop(part, None)
        elif size_class.free:
            part, _ = size_class.free.popitem()
        elif self._free:
            part = self._divide(self._free.pop(), size_class)
        else:
            taken = self._reclaim(size_class, size_class.reclaimable, self._idle)
            taken = taken or self._reclaim(size_class, size_class.wished, self._idle_wished)
            if taken is None:
                return None
            part, unused = taken
        part.generation = self._segment.bump_generation(part.slot.number, part.number)
        part.is_speculative = False
        part.slot.num_filling += 1
        self._stop_idling(part.slot)
        return part, unused

    def seal(self, part: Part, key: RecordKey) -> None:
        """The part holds `key` now, readable until it is refilled."""
        part.slot.num_filling -= 1
        part.key = key
        self._by_key[key] = part
        self._make_reclaimable(part)

    def wish(self, part: Part, wisher: Hashable) -> None:
        """`wisher` will likely lease this sealed part: until it does or takes the wish back, the
        part goes last. A part that is leased stays as it is.
        """
        if part not in self._leases:
            self._change(part, part.wishers | {wisher})

    def take_back(self, part: Part, wisher: Hashable) -> None:
        """It does not wish for the part any more. What nobody wishes for goes first of all."""
        if part.wishers:
            self._change(part, part.wishers - {wisher})

    def give_back(self, part: Part) -> None:
        """A filling part that will not be sealed."""
        slot = part.slot
        slot.num_filling -= 1
        part.size_class.free[part] = None
        if slot.is_used:
            return
        if any(one.key for one in slot.parts):
            self._make_idle(slot, next(self._time))
        else:
            self._clear(slot)
            self._free.append(slot)

    @property
    def is_divided(self) -> bool:
        """Whether a slot was ever given to a class of smaller records."""
        return any(num_parts > 1 for num_parts in self._classes)

    @property
    def num_free(self) -> int:
        """Slots that no part is in."""
        return len(self._free)

    def has_free(self, num_parts: int, num_spare: int) -> bool:
        """Whether `fill` would take free memory, and leave `num_spare` slots free."""
        size_class = self._classes.get(num_parts)
        return len(self._free) > num_spare or bool(size_class and size_class.free)

    def resident(self) -> list[RecordKey]:
        return list(self._by_key)

    def wished_by(self, wisher: Hashable) -> list[Part]:
        return [
            part for one in self._classes.values() for part in one.wished if wisher in part.wishers
        ]

    def leased(self) -> list[RecordKey]:
        return [part.key for part in self._leases if part.key is not None]

    def counts(self) -> dict[str, int]:
        """Slots by state, a divided one by that of the part that binds it most. When no session is
        open, filling and leased are 0.
        """
        counts = Counter(slot.state for slot in self._slots)
        return {state: counts[state] for state in ("free", "filling", "leased", "reclaimable")}

    def _make_reclaimable(self, part: Part) -> None:
        part.released = next(self._time)
        part.size_class.queue_of(part)[part] = None
        if not part.slot.is_used:
            self._make_idle(part.slot, part.released)

    def _make_idle(self, slot: Slot, now: int) -> None:
        slot.idle_since = now
        is_wished = any(part.wishers for part in slot.parts)
        (self._idle_wished if is_wished else self._idle)[slot] = None

    def _stop_idling(self, slot: Slot) -> None:
        self._idle.pop(slot, None)
        self._idle_wished.pop(slot, None)

    def _change(self, part: Part, wishers: set[Hashable]) -> None:
        """Of a reclaimable part. One that nobody wishes for any more goes first."""
        del part.size_class.queue_of(part)[part]
        part.wishers = wishers
        queue = part.size_class.queue_of(part)
        part.released = next(self._time) if wishers else 0
        queue[part] = None
        queue.move_to_end(part, last=bool(wishers))
        if part.slot in self._idle or part.slot in self._idle_wished:
            self._stop_idling(part.slot)
            self._make_idle(part.slot, part.released)
            if part.slot in self._idle:
                self._idle.move_to_end(part.slot, last=False)

    def _reclaim(
        self,
        size_class: SizeClass,
        reclaimable: OrderedDict[Part, None],
        idle_slots: OrderedDict[Slot, None],
    ) -> tuple[Part, list[RecordKey]] | None:
        """Whichever was not used for longer, as `fill` returns it. None: there is neither."""
        oldest, idle = next(iter(reclaimable), None), next(iter(idle_slots), None)
        if oldest is not None and (idle is None or oldest.released <= idle.idle_since):
            return oldest, self._forget(oldest)
        if idle is None:
            return None
        unused = self._clear(idle)
        return self._divide(idle, size_class), unused

    def _add_class(self, num_parts: int) -> SizeClass:
        part_bytes = self._segment.layout.part_bytes(num_parts)
        self._classes[num_parts] = SizeClass(num_parts, part_bytes)
        return self._classes[num_parts]

    def _divide(self, slot: Slot, size_class: SizeClass) -> Part:
        """The first part of a free slot, whose others are free parts from now on."""
        slot.parts = [
            Part(slot, size_class, number, number * size_class.part_bytes)
            for number in range(size_class.num_parts)
        ]
        first, *others = slot.parts
        size_class.free.update(dict.fromkeys(reversed(others)))
        return first

    def _clear(self, slot: Slot) -> list[RecordKey]:
        """Undivide a slot of which no part is used. Returns the speculative records in it."""
        unused: list[RecordKey] = []
        for part in slot.parts:
            if part.key is None:
                del part.size_class.free[part]
            else:
                unused += self._forget(part)
                # Nothing may still be read here: the next division has its generations elsewhere.
                self._segment.bump_generation(slot.number, part.number)
        self._stop_idling(slot)
        slot.parts = []
        return unused

    def _forget(self, part: Part) -> list[RecordKey]:
        """The record of a reclaimable part is not found any more. Returns it if it is
        speculative.
        """
        key, part.key = part.key, None
        assert key is not None
        del part.size_class.queue_of(part)[part]
        part.wishers.clear()
        del self._by_key[key]
        return [key] if part.is_speculative else []
