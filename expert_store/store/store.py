"""Lends experts: finds them or has them read, accounts for leases, quarantines what is damaged.

Called from any thread; nothing here waits for the disk but `stop`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expert_store.io.assembly import Assembly
from expert_store.manifest.extents import ExpertRecord
from expert_store.manifest.manifest import Manifest
from expert_store.store.device import Device, Issued
from expert_store.store.fills import Fill, FillQueue, Priority
from expert_store.store.segment import Segment
from expert_store.store.sessions import Session, SessionTable
from expert_store.store.slots import Slot, SlotPool
from proto import errors
from proto.expert import RecordKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lent:
    """An expert lent to a session, or why not. bytes_read is 0 when it was in memory already.

    read_s:   from the first byte asked of the device to the last that came
    verify_s: checksumming after that
    """

    key: RecordKey
    slot: int = 0
    generation: int = 0
    tensor_offsets: tuple[int, ...] = ()
    bytes_read: int = 0
    read_s: float = 0.0
    verify_s: float = 0.0
    error: errors.FlashMoEError | None = None


Deliver = Callable[[list[Lent]], None]


@dataclass
class Counters:
    """Since start. busy_s: with at least one read at the device."""

    demand_reads: int = 0
    prefetch_reads: int = 0
    refill_reads: int = 0
    bytes_read: int = 0
    shared_hits: int = 0
    prefetches_dropped: int = 0
    prefetches_withdrawn: int = 0
    prefetches_used: int = 0
    prefetch_bytes_wasted: int = 0
    read_s: float = 0.0
    busy_s: float = 0.0


@dataclass
class ExpertStore:
    """One model's experts in one segment.

    lock: the one that the session table holds, too
    read_depth: pieces asked of the device at once, at most
    max_queued: records that may wait for it
    piece_bytes: the longest read
    direct_io: whether reads bypass the page cache
    device: what pieces are asked of
    """

    manifest: Manifest
    segment: Segment
    slots: SlotPool
    sessions: SessionTable
    lock: threading.RLock
    read_depth: int
    max_queued: int
    piece_bytes: int
    direct_io: bool
    device: Device
    counters: Counters = field(default_factory=Counters)
    quarantined: dict[RecordKey, str] = field(default_factory=dict)
    _fills: dict[RecordKey, Fill[Session]] = field(default_factory=dict)
    _queue: FillQueue[Session] = field(default_factory=FillQueue)
    _num_at_device: int = 0
    _busy_since_ns: int = 0
    _is_stopping: bool = False

    def __post_init__(self) -> None:
        self._left = threading.Condition(self.lock)  # the device has nothing left to do
        self.num_spare = self.segment.layout.num_slots - self.sessions.max_leased

    def acquire(self, session: Session, keys: Sequence[RecordKey], deliver: Deliver) -> None:
        """Lend every key: `deliver` hears of what is in memory before this returns, of the rest as
        it comes, on another thread. A damaged expert carries its error and holds no slot.

        Raises UnknownExpert, InvalidRequest (a key twice or already leased), SlotsExhausted
        beyond the quota, QueueFull, Unavailable for a closed session.
        """
        with self.lock:
            self._check(keys)
            self.sessions.reserve(session, keys)
            found = [self._find_or_read(session, key, deliver) for key in keys]
            self._ask_device()
        lent = [item for item in found if item is not None]
        if lent:
            deliver(lent)

    def prefetch(self, session: Session, keys: Sequence[RecordKey]) -> None:
        """Read, when nobody waits, what is not in memory; what finds no room is dropped and
        counted.

        Raises UnknownExpert.
        """
        with self.lock:
            for key in keys:
                record = self._record(key)
                if self.slots.find(key) or key in self.quarantined:
                    continue
                fill = self._fills.get(key)
                if fill is not None:
                    fill.wishers.add(session)
                    self._revive(fill, Priority.PREFETCH)
                elif len(self._fills) >= self.max_queued:
                    self.counters.prefetches_dropped += 1
                else:
                    self._start(record, Priority.PREFETCH).wishers.add(session)
            self._ask_device()

    def withdraw(self, session: Session, keys: Sequence[RecordKey]) -> None:
        """Prefetches that `session` no longer wants: what nobody else wants is read no further.

        Nothing new is asked of the device: what comes after it may be more urgent.
        """
        with self.lock:
            for key in keys:
                fill = self._fills.get(key)
                if fill is None or fill.waiters or fill.is_withdrawn:
                    continue
                fill.wishers.discard(session)
                if not fill.wishers:
                    fill.is_withdrawn = True
                    self.counters.prefetches_withdrawn += 1
                    self._settle(fill)

    def refill(self, keys: Sequence[RecordKey]) -> None:
        """Read what was in memory before, last of all and into free slots alone; the first go
        first. Experts the model does not have are left out.
        """
        with self.lock:
            room = self.slots.num_free - self.num_spare
            known = [key for key in keys if key in self.manifest.records][: max(0, room)]
            for key in known:
                if self.slots.find(key) is None and key not in self._fills:
                    self._start(self.manifest.records[key], Priority.REFILL)
            self._ask_device()
        logger.info("refilling", extra={"experts": len(known)})

    def wanted(self) -> list[RecordKey]:
        """What is lent now: what a store that starts again should have."""
        with self.lock:
            return self.slots.leased()

    def piece_came(self, issued: Issued) -> None:
        """The device is free for another; said whether or not the read went well."""
        with self.lock:
            self._leave_device(issued.fill)
            self._ask_device()

    def piece_done(
        self,
        issued: Issued,
        is_whole: bool,
        error: errors.FlashMoEError | None,
        *,
        came_now: bool,
    ) -> None:
        """A piece was read and hashed, or failed; lends the record once it is whole.

        came_now: `piece_came` was not said
        """
        fill = issued.fill
        with self.lock:
            if came_now:
                self._leave_device(fill)
            fill.num_in_flight -= 1
            fill.error = fill.error or error
            lent = self._seal(fill) if is_whole else self._settle(fill)
            self._ask_device()
        for deliver, item in lent:
            deliver([item])

    def stop(self) -> None:
        """Ask nothing more of the device, and wait for what it was asked."""
        with self._left:
            self._is_stopping = True
            self._left.wait_for(lambda: self._num_at_device == 0)

    def give_up(self) -> None:
        """After `stop` and all readers: nothing stays half filled, every waiter gets an error."""
        lent = []
        with self.lock:
            for fill in list(self._fills.values()):
                fill.error = fill.error or errors.Unavailable("the store is stopping: retry")
                lent += self._settle(fill)
        for deliver, item in lent:
            deliver([item])

    @property
    def is_idle(self) -> bool:
        return not self._fills

    def _check(self, keys: Sequence[RecordKey]) -> None:
        for key in keys:
            self._record(key)
        if len(set(keys)) != len(keys):
            raise errors.InvalidRequest("an expert is asked for twice in one message")
        num_waiting = sum(
            f.priority is Priority.DEMAND and not f.slot for f in self._fills.values()
        )
        if num_waiting >= self.max_queued:
            raise errors.QueueFull(f"{num_waiting} reads are waiting already: retry later")

    def _record(self, key: RecordKey) -> ExpertRecord:
        record = self.manifest.records.get(key)
        if record is None:
            raise errors.UnknownExpert(f"this model has no expert {key}")
        return record

    def _find_or_read(self, session: Session, key: RecordKey, deliver: Deliver) -> Lent | None:
        slot = self.slots.find(key)
        if slot is not None:
            self.counters.shared_hits += 1
            return self._lend(session, key, slot)
        if key in self.quarantined:
            session.awaited.discard(key)
            return Lent(key, error=errors.ExpertDamaged(self.quarantined[key]))
        fill = self._fills.get(key) or self._start(self.manifest.records[key], Priority.DEMAND)
        fill.waiters.append((session, deliver))
        self._revive(fill, Priority.DEMAND)
        return None

    def _start(self, record: ExpertRecord, priority: Priority) -> Fill[Session]:
        fill = self._fills[record.key] = Fill[Session](record, priority)
        self._queue.add(fill)
        return fill

    def _revive(self, fill: Fill[Session], priority: Priority) -> None:
        """Somebody wants it, as urgently as that: also when it was about to be given up."""
        if fill.is_withdrawn or priority < fill.priority:
            fill.is_withdrawn = False
            fill.priority = min(priority, fill.priority)
            self._queue.add(fill)

    def _give_slot(self, fill: Fill[Session]) -> bool:
        """Whether there is one now; a refill takes a free one or none."""
        if fill.priority is Priority.REFILL and self.slots.num_free <= self.num_spare:
            fill.is_withdrawn = True
            self._settle(fill)
            return False
        slot = self.slots.next_to_fill()
        if slot is None:
            return False
        if slot.is_speculative and slot.key is not None:
            self.counters.prefetch_bytes_wasted += self.manifest.records[slot.key].payload_bytes
        self.slots.fill(slot)
        fill.slot, fill.view = slot, self.segment.slot(slot.number)
        fill.assembly = Assembly(fill.record, fill.view, self.piece_bytes)
        fill.start_ns = time.perf_counter_ns()
        return True

    def _ask_device(self) -> None:
        """For pieces up to the depth, the most urgent first; what waits for a slot is passed by
        what has one. Whoever wants more, or leaves the device, ends with this; slots that are
        released are looked at by the next to do so.
        """
        issued: list[Issued] = []
        while not self._is_stopping and self._num_at_device < self.read_depth:
            fill = self._queue.first()
            if fill is not None and not fill.slot and not self._give_slot(fill):
                if fill.is_withdrawn:
                    continue
                fill = self._queue.first_begun()
            if fill is None:
                break
            issued.append(self._issue(fill))
        if issued:
            self.device.submit(issued)

    def _issue(self, fill: Fill[Session]) -> Issued:
        if self._num_at_device == 0:
            self._busy_since_ns = time.perf_counter_ns()
        self._num_at_device += 1
        fill.num_issued += 1
        fill.num_in_flight += 1
        return Issued(fill, fill.num_issued - 1)

    def _seal(self, fill: Fill[Session]) -> list[tuple[Deliver, Lent]]:
        """The record is whole: its slot is readable, and everybody who waits has a lease."""
        slot = self._close(fill)
        assert slot is not None
        fill.is_withdrawn = False  # too late: nothing of it is given up any more
        self.slots.seal(slot, fill.record.key)
        slot.is_speculative = fill.priority is Priority.PREFETCH
        self._count(fill)
        lent = []
        for number, (session, deliver) in enumerate(fill.waiters):
            self.counters.shared_hits += number > 0
            item = self._lend(session, fill.record.key, slot, None if number else fill)
            if item is not None:
                lent.append((deliver, item))
        return lent

    def _settle(self, fill: Fill[Session]) -> list[tuple[Deliver, Lent]]:
        """Give a failed or withdrawn fill up once nobody writes into its slot."""
        if not fill.is_over:
            return []
        slot, key = self._close(fill), fill.record.key
        if slot is not None:
            self.slots.give_back(slot)
        if fill.error is None:
            self.counters.prefetch_bytes_wasted += self._bytes_issued(fill)
            return []
        if isinstance(fill.error, errors.ExpertDamaged):
            self.quarantined[key] = str(fill.error)
            logger.error("expert quarantined", extra={"key": str(key), "reason": str(fill.error)})
        for session, _ in fill.waiters:
            session.awaited.discard(key)
        return [(deliver, Lent(key, error=fill.error)) for _, deliver in fill.waiters]

    def _close(self, fill: Fill[Session]) -> Slot | None:
        del self._fills[fill.record.key]
        if fill.view is not None:
            fill.view.release()
        return fill.slot

    def _leave_device(self, fill: Fill[Session]) -> None:
        fill.arrived_ns = time.perf_counter_ns()
        self._num_at_device -= 1
        if self._num_at_device == 0:
            self.counters.busy_s += (fill.arrived_ns - self._busy_since_ns) / 1e9
            self._left.notify_all()

    def _bytes_issued(self, fill: Fill[Session]) -> int:
        if fill.assembly is None:
            return 0
        return sum(piece.needed_bytes for piece in fill.assembly.pieces[: fill.num_issued])

    def _lend(
        self, session: Session, key: RecordKey, slot: Slot, read: Fill[Session] | None = None
    ) -> Lent | None:
        """read: the fill whose cost this session bears. None: the session ended."""
        if not self.sessions.lease(session, key, slot):
            return None
        self.counters.prefetches_used += slot.is_speculative
        slot.is_speculative = False
        record = self.manifest.records[key]
        lent = Lent(key, slot.number, slot.generation, record.tensor_offsets)
        if read is None:
            return lent
        return Lent(
            key,
            slot.number,
            slot.generation,
            record.tensor_offsets,
            record.payload_bytes,
            (read.arrived_ns - read.start_ns) / 1e9,
            (time.perf_counter_ns() - read.arrived_ns) / 1e9,
        )

    def _count(self, fill: Fill[Session]) -> None:
        match fill.priority:
            case Priority.DEMAND:
                self.counters.demand_reads += 1
            case Priority.PREFETCH:
                self.counters.prefetch_reads += 1
            case Priority.REFILL:
                self.counters.refill_reads += 1
        self.counters.bytes_read += fill.record.payload_bytes
        self.counters.read_s += (fill.arrived_ns - fill.start_ns) / 1e9
