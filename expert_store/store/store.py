"""Lends records: finds them in memory or has them read, and accounts for leases.

Called from any thread; nothing here waits for the disk but `stop`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from expert_store.io.device import Device
from expert_store.manifest.manifest import Manifest
from expert_store.store import leases
from expert_store.store.assembly import Assembly
from expert_store.store.counters import Counters, SlotCounts
from expert_store.store.fill import Deliver, Fill, PieceRead, Priority
from expert_store.store.quarantine import Quarantine
from expert_store.store.read_queue import ReadQueue
from expert_store.store.segment import Segment
from expert_store.store.sessions import Session, SessionTable
from expert_store.store.slots import Part, SlotPool
from proto import errors, stats
from proto import expert_store_pb2 as pb
from proto import stats_pb2 as stats_pb
from proto.expert import RecordKey
from proto.stats import gauge

logger = logging.getLogger(__name__)


@dataclass
class ExpertStore:
    """One model's records in one segment.

    lock: the one that the session table holds, too
    read_depth: pieces that the device reads at once; max_queued: records that may wait for it
    piece_bytes: the longest read
    direct_io: whether reads bypass the page cache
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
    device: Device[PieceRead]
    counters: Counters = field(default_factory=Counters)
    quarantined: Quarantine = field(default_factory=Quarantine)

    def __post_init__(self) -> None:
        layout = self.segment.layout
        self.num_spare = layout.num_slots - self.sessions.max_leased_bytes // layout.slot_bytes
        self._num_parts = self.manifest.size_classes.num_parts
        self._reads = ReadQueue(
            self.device, self.lock, self.read_depth, self.counters, self._give_memory
        )

    @property
    @gauge("flashmoe_store_direct_io", "1: reads bypass the page cache", key="direct_io")
    def is_direct(self) -> bool:
        return self.direct_io

    def snapshot(self) -> stats_pb.Snapshot:
        """What it counts and holds now."""
        held = SlotCounts(**self.slots.counts()), self.sessions, self.quarantined
        return stats.snapshot(self.counters, *held, self._reads, self)

    def acquire(self, session: Session, keys: Sequence[RecordKey], deliver: Deliver) -> None:
        """Lend every key. `deliver` gets the leases of what is in memory before this returns, the
        others as they come, on another thread. A damaged record's lease carries its error and holds
        no slot.

        Raises UnknownExpert, InvalidRequest (a key twice or already leased), SlotsExhausted
        beyond the quota, QueueFull, Unavailable for a closed session.
        """
        with self.lock:
            self._check(keys)
            self.sessions.reserve(session, keys)
            session.acquires(keys)
            found = [self._find_or_read(session, key, deliver) for key in keys]
            self._reads.issue()
            refused = self._refuse_starved()
        lent = [lease for lease in found if lease is not None]
        if lent:
            deliver(lent)
        leases.hand_over(refused)

    def prefetch(self, session: Session, keys: Sequence[RecordKey]) -> None:
        """Read, when nobody waits, what is not in memory, the nearest layer first. What finds no
        room is dropped and counted. Raises UnknownExpert.
        """
        with self.lock:
            for key in keys:
                record = self.manifest.record(key)
                if (part := self.slots.find(key)) is not None:
                    self.slots.wish(part, session)
                    continue
                if key in self.quarantined:
                    continue
                fill = self._reads.fills.get(key)
                if fill is not None:
                    fill.wishers.add(session)
                    self._reads.want(fill, Priority.PREFETCH, session.turn_of(key))
                elif len(self._reads.fills) >= self.max_queued:
                    self.counters.prefetches_dropped += 1
                else:
                    fill = self._reads.start(record, Priority.PREFETCH, session.turn_of(key))
                    fill.wishers.add(session)
            self._reads.issue()

    def withdraw(self, session: Session, keys: Sequence[RecordKey]) -> None:
        """Prefetches that `session` no longer wants: what nobody else wants is read no further.

        Issues no read: what the same message asks for may be more urgent.
        """
        with self.lock:
            for key in keys:
                if (part := self.slots.find(key)) is not None:
                    self.slots.take_back(part, session)
                    continue
                fill = self._reads.fills.get(key)
                if fill is None or fill.waiters or fill.is_withdrawn:
                    continue
                fill.wishers.discard(session)
                if not fill.wishers:
                    fill.is_withdrawn = True
                    self.counters.prefetches_withdrawn += 1
                    self._settle(fill)

    def refill(self, keys: Sequence[RecordKey]) -> None:
        """Read what was in memory before, last of all and into free slots alone; the first go
        first. Records the model does not have are left out.
        """
        with self.lock:
            room_bytes = (self.slots.num_free - self.num_spare) * self.segment.layout.slot_bytes
            known = [key for key in keys if key in self.manifest.records]
            ends = accumulate(self.sessions.lease_bytes[key.variant] for key in known)
            known = [key for key, end in zip(known, ends, strict=True) if end <= room_bytes]
            for key in known:
                if self.slots.find(key) is None and key not in self._reads.fills:
                    self._reads.start(self.manifest.records[key], Priority.REFILL)
            self._reads.issue()
        logger.info("refilling", extra={"experts": len(known)})

    def wanted(self) -> list[RecordKey]:
        """What is lent now: what a store that starts again should have."""
        with self.lock:
            return self.slots.leased()

    def piece_came(self, read: PieceRead) -> None:
        """The device is free for another read, whether or not this one went well."""
        with self.lock:
            self._reads.left_device(read.fill)
            self._reads.issue()

    def piece_done(
        self,
        read: PieceRead,
        is_whole: bool,
        error: errors.FlashMoEError | None,
        *,
        came_now: bool,
    ) -> None:
        """A piece was read and hashed, or failed. Lends the record once it is whole.

        came_now: `piece_came` was not called
        """
        fill = read.fill
        with self.lock:
            if came_now:
                self._reads.left_device(fill)
            fill.num_in_flight -= 1
            fill.error = fill.error or error
            deliveries = self._seal(fill) if is_whole else self._settle(fill)
            self._reads.issue()
            deliveries += self._refuse_starved()
        leases.hand_over(deliveries)

    def stop(self) -> None:
        """Issue no more reads, and block until those at the device ended."""
        self._reads.stop()

    def give_up(self) -> None:
        """After `stop`, when no reader is left: no slot stays half filled, and every waiter gets an
        error.
        """
        deliveries: list[leases.Delivery] = []
        with self.lock:
            for fill in list(self._reads.fills.values()):
                fill.error = fill.error or errors.Unavailable("the store is stopping: retry")
                deliveries += self._settle(fill)
        leases.hand_over(deliveries)

    @property
    def is_idle(self) -> bool:
        return not self._reads.fills

    def _check(self, keys: Sequence[RecordKey]) -> None:
        for key in keys:
            self.manifest.record(key)
        if len(set(keys)) != len(keys):
            raise errors.InvalidRequest("an expert is asked for twice in one message")
        num_waiting = self._reads.num_waiting()
        if num_waiting >= self.max_queued:
            raise errors.QueueFull(f"{num_waiting} reads are waiting already: retry later")

    def _find_or_read(self, session: Session, key: RecordKey, deliver: Deliver) -> pb.Lease | None:
        if (part := self.slots.find(key)) is not None:
            self.counters.shared_hits += 1
            return self._lend(session, key, part)
        if key in self.quarantined:
            self.sessions.drop_awaited(session, key)
            return leases.refused(key, self.quarantined.error(key))
        if (fill := self._reads.fills.get(key)) is None:
            fill = self._reads.start(self.manifest.records[key], Priority.DEMAND)
        fill.waiters.append((session, deliver))
        self._reads.want(fill, Priority.DEMAND)
        return None

    def _give_memory(self, fill: Fill) -> bool:
        """Whether the fill has a part of a slot now. A refill takes a free one or is withdrawn."""
        num_parts = self._num_parts[fill.record.key.variant]
        is_refill = fill.priority is Priority.REFILL
        if is_refill and not self.slots.has_free(num_parts, self.num_spare):
            fill.is_withdrawn = True
            self._settle(fill)
            return False
        taken = self.slots.fill(num_parts)
        if taken is None:
            return False
        fill.part, unused = taken
        for key in unused:
            self.counters.prefetch_bytes_wasted += self.manifest.records[key].payload_bytes
        fill.view = self.segment.view(*fill.part.place)
        fill.assembly = Assembly(fill.record, fill.view, self.piece_bytes)
        fill.start_ns = time.perf_counter_ns()
        return True

    def _refuse_starved(self) -> list[leases.Delivery]:
        """What quotas allow has room as long as no slot is divided. Where slots are, leases of a
        few small records may stand in many: a read that would wait for their release is refused.
        """
        deliveries: list[leases.Delivery] = []
        if self.slots.is_divided:
            for fill in self._reads.starved():
                fill.error = errors.SlotsExhausted(
                    f"expert {fill.record.key} has no room: records of smaller variants are lent "
                    "in every slot, release some and retry"
                )
                deliveries += self._settle(fill)
        return deliveries

    def _seal(self, fill: Fill) -> list[leases.Delivery]:
        """The record is whole: it is readable, and every waiter has a lease."""
        self._reads.close(fill)
        part = fill.part
        assert part is not None
        fill.is_withdrawn = False  # too late: nothing of it is given up any more
        self.slots.seal(part, fill.record.key)
        for session in fill.wishers:
            if not session.ended:
                self.slots.wish(part, session)
        is_guess = fill.priority is Priority.PREFETCH
        part.is_speculative, part.ahead_bytes = is_guess, fill.ahead_bytes
        self.counters.count_read(fill)
        deliveries = []
        for number, (session, deliver) in enumerate(fill.waiters):
            self.counters.shared_hits += number > 0
            lease = self._lend(session, fill.record.key, part, None if number else fill)
            if lease is not None:
                deliveries.append((deliver, lease))
        return deliveries

    def _settle(self, fill: Fill) -> list[leases.Delivery]:
        """Give a failed or withdrawn fill up, once nobody writes into its memory."""
        if not fill.is_over:
            return []
        self._reads.close(fill)
        if fill.part is not None:
            self.slots.give_back(fill.part)
        if fill.error is None:
            self.counters.prefetch_bytes_wasted += fill.issued_bytes
            return []
        key = fill.record.key
        if isinstance(fill.error, errors.ExpertDamaged):
            self.quarantined.add(key, fill.error)
        for session, _ in fill.waiters:
            self.sessions.drop_awaited(session, key)
        return [(deliver, leases.refused(key, fill.error)) for _, deliver in fill.waiters]

    def _lend(
        self, session: Session, key: RecordKey, part: Part, read: Fill | None = None
    ) -> pb.Lease | None:
        """read: the fill whose cost this session bears. None: the session ended."""
        if not self.sessions.lease(session, key, part):
            return None
        self.counters.prefetches_used += part.is_speculative
        self.counters.prefetch_bytes_used += part.ahead_bytes
        part.is_speculative, part.ahead_bytes = False, 0
        return leases.granted(self.manifest.records[key], part, read)
