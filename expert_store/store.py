"""Lends experts: finds or reads them, accounts for leases, quarantines what is damaged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from expert_store.extents import ExpertRecord
from expert_store.inflight import Inflight
from expert_store.manifest import Manifest
from expert_store.reader import Priority, ReadQueue, SourceFiles, read_record
from expert_store.segment import Segment
from expert_store.sessions import Session, SessionTable
from expert_store.slots import Slot, SlotPool
from proto import errors
from proto.expert import ExpertKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lent:
    """An expert lent to a session, or why not. bytes_read is 0 when it was in memory already."""

    key: ExpertKey
    slot: int = 0
    generation: int = 0
    tensor_offsets: tuple[int, ...] = ()
    bytes_read: int = 0
    read_s: float = 0.0
    error: errors.FlashMoEError | None = None


@dataclass
class Counters:
    """Since start."""

    demand_reads: int = 0
    prefetch_reads: int = 0
    bytes_read: int = 0
    shared_hits: int = 0
    prefetches_dropped: int = 0
    read_s: float = 0.0


@dataclass
class ExpertStore:
    """One model's experts in one segment."""

    manifest: Manifest
    segment: Segment
    slots: SlotPool
    sessions: SessionTable
    queue: ReadQueue
    files: SourceFiles
    counters: Counters = field(default_factory=Counters)
    quarantined: dict[ExpertKey, str] = field(default_factory=dict)
    _inflight: Inflight[float] = field(default_factory=Inflight)

    async def acquire(self, session: Session, keys: Sequence[ExpertKey]) -> list[Lent]:
        """Lend every key, in order; a damaged one carries its error and holds no slot.

        Raises UnknownExpert, InvalidRequest (a key twice or already leased), SlotsExhausted
        beyond the quota, QueueFull.
        """
        self._check(session, keys)
        self.queue.check_room()
        self.sessions.reserve(session, len(keys))
        return list(await asyncio.gather(*(self._lend(session, key) for key in keys)))

    def prefetch(self, keys: Sequence[ExpertKey]) -> None:
        """Read, when nobody waits, what is not in memory; what finds no room is dropped and
        counted.

        Raises UnknownExpert.
        """
        for key in keys:
            self._record(key)
            if self.slots.find(key) or key in self._inflight or key in self.quarantined:
                continue
            if len(self._inflight) >= self.queue.capacity:
                self.counters.prefetches_dropped += 1
                continue
            self._inflight.start(key, lambda key=key: self._fill(key, Priority.PREFETCH))  # type: ignore[misc]

    async def drain(self) -> None:
        """Let reads under way end: a thread must not write into a slot that is gone."""
        await self._inflight.drain()

    def _check(self, session: Session, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            self._record(key)
            if key in session.leases:
                raise errors.InvalidRequest(f"{key} is leased by this session already")
        if len(set(keys)) != len(keys):
            raise errors.InvalidRequest("an expert is asked for twice in one message")

    def _record(self, key: ExpertKey) -> ExpertRecord:
        record = self.manifest.records.get(key)
        if record is None:
            raise errors.UnknownExpert(f"this model has no expert {key}")
        return record

    async def _lend(self, session: Session, key: ExpertKey) -> Lent:
        try:
            slot, bytes_read, read_s = await self._find_or_read(key)
        except (errors.ExpertDamaged, errors.SlotsExhausted) as error:
            return Lent(key, error=error)
        finally:
            session.reserved -= 1
        self.sessions.lease(session, key, slot)  # no await between finding and leasing
        if bytes_read == 0:
            self.counters.shared_hits += 1
        record = self.manifest.records[key]
        return Lent(key, slot.number, slot.generation, record.tensor_offsets, bytes_read, read_s)

    async def _find_or_read(self, key: ExpertKey) -> tuple[Slot, int, float]:
        bytes_read, read_s = 0, 0.0
        # Another fill may reclaim the slot before a waiter wakes, so look again after every await.
        while (slot := self.slots.find(key)) is None:
            if key in self.quarantined:
                raise errors.ExpertDamaged(self.quarantined[key])
            is_reader = key not in self._inflight
            if not is_reader:
                self.queue.promote(key)
            seconds = await self._inflight.join(key, lambda: self._fill(key, Priority.DEMAND))
            if is_reader:
                bytes_read, read_s = self.manifest.records[key].payload_bytes, seconds
        return slot, bytes_read, read_s

    async def _fill(self, key: ExpertKey, priority: Priority) -> float:
        record = self.manifest.records[key]
        async with self.queue.turn(key, priority):
            try:
                with (
                    self.slots.filling(key) as slot,
                    self.segment.slot(slot.number) as view,
                ):
                    read_s = await self.queue.run(lambda: read_record(self.files, record, view))
            except errors.ExpertDamaged as error:
                self.quarantined[key] = str(error)
                logger.error("expert quarantined", extra={"key": str(key), "reason": str(error)})
                raise
        self._count(record, priority, read_s)
        return read_s

    def _count(self, record: ExpertRecord, priority: Priority, read_s: float) -> None:
        if priority is Priority.DEMAND:
            self.counters.demand_reads += 1
        else:
            self.counters.prefetch_reads += 1
        self.counters.bytes_read += record.payload_bytes
        self.counters.read_s += read_s
