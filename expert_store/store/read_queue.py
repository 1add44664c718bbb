"""Which records are read, and in which order: demand before prefetch, the nearest layer's first,
piece by piece.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from expert_store.io.device import Device
from expert_store.manifest.extents import ExpertRecord
from expert_store.store.counters import Counters
from expert_store.store.fill import NOW, Fill, PieceRead, Priority, Turn
from proto.expert import RecordKey
from proto.stats import gauge


@dataclass
class ReadQueue:
    """The fills under way, one a record. Guarded by `lock`, which its caller holds.

    read_depth:  pieces that the device reads at once, at most
    give_memory: finds a part of a slot for a fill; False when there is none now, or the fill was
                 withdrawn
    """

    device: Device[PieceRead]
    lock: threading.RLock
    read_depth: int
    counters: Counters
    give_memory: Callable[[Fill], bool]
    fills: dict[RecordKey, Fill] = field(default_factory=dict)
    _heap: list[tuple[Priority, Turn, int, Fill]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _num_at_device: int = 0
    _busy_since_ns: int = 0
    _start_ns: int = field(default_factory=time.perf_counter_ns)
    _is_stopping: bool = False

    def __post_init__(self) -> None:
        self._left = threading.Condition(self.lock)  # the device has nothing left to do

    def start(self, record: ExpertRecord, priority: Priority, turn: Turn = NOW) -> Fill:
        fill = self.fills[record.key] = Fill(record, priority, turn)
        self._add(fill)
        return fill

    def want(self, fill: Fill, priority: Priority, turn: Turn = NOW) -> None:
        """A session wants a fill that is under way: it becomes as urgent as that, also when it was
        withdrawn.
        """
        if fill.is_withdrawn or (priority, turn) < (fill.priority, fill.turn):
            fill.is_withdrawn = False
            fill.priority, fill.turn = min((priority, turn), (fill.priority, fill.turn))
            self._add(fill)

    def issue(self) -> None:
        """Submit reads until `read_depth` are at the device, the most urgent fill first. A fill
        that cannot get memory is passed by those that have some. Called after every acquire,
        prefetch and completion; not after a release: the next call finds what it left.
        """
        reads: list[PieceRead] = []
        while not self._is_stopping and self._num_at_device < self.read_depth:
            fill = self._first()
            if fill is not None and not fill.part and not self.give_memory(fill):
                if fill.is_withdrawn:
                    continue
                fill = self._first_with_memory()
            if fill is None:
                break
            ahead_bytes = fill.ahead_bytes
            reads.append(fill.next_read())
            self.counters.prefetch_bytes_read += fill.ahead_bytes - ahead_bytes
            if self._num_at_device == 0:
                self._busy_since_ns = time.perf_counter_ns()
            self._num_at_device += 1
        if reads:
            self.device.submit(reads)

    def left_device(self, fill: Fill) -> None:
        """One read of `fill` is no longer at the device, whether or not it went well."""
        fill.arrived_ns = time.perf_counter_ns()
        self._num_at_device -= 1
        if self._num_at_device == 0:
            self.counters.busy_s += (fill.arrived_ns - self._busy_since_ns) / 1e9
            self._left.notify_all()

    @property
    @gauge("flashmoe_store_busy_ratio", "Share of the time since start with a read at the device")
    def busy_share(self) -> float:
        """In [0, 1]; the reads at the device now count too."""
        with self.lock:
            now_ns = time.perf_counter_ns()
            busy_ns = now_ns - self._busy_since_ns if self._num_at_device else 0
            return (self.counters.busy_s * 1e9 + busy_ns) / (now_ns - self._start_ns)

    def close(self, fill: Fill) -> None:
        """The fill is not under way any more: whole, failed or withdrawn."""
        del self.fills[fill.record.key]
        if fill.view is not None:
            fill.view.release()

    def num_waiting(self) -> int:
        """Demand reads that have not begun."""
        return sum(f.priority is Priority.DEMAND and not f.part for f in self.fills.values())

    def starved(self) -> list[Fill]:
        """Demand reads that wait for memory while no fill has any, so that none will give it up."""
        if any(fill.part for fill in self.fills.values()):
            return []
        return [fill for fill in self.fills.values() if fill.priority is Priority.DEMAND]

    def stop(self) -> None:
        """Submit nothing more, and block until the device has read what it has."""
        with self._left:
            self._is_stopping = True
            self._left.wait_for(lambda: self._num_at_device == 0)

    def _add(self, fill: Fill) -> None:
        """Also after its priority changed: what it had before no longer counts."""
        heapq.heappush(self._heap, (fill.priority, fill.turn, next(self._order), fill))

    def _first(self) -> Fill | None:
        """Whose piece is read next."""
        while self._heap:
            priority, turn, _, fill = self._heap[0]
            if (priority, turn) == (fill.priority, fill.turn) and not fill.is_issued:
                return fill
            heapq.heappop(self._heap)
        return None

    def _first_with_memory(self) -> Fill | None:
        begun = [
            entry
            for entry in self._heap
            if entry[:2] == (entry[3].priority, entry[3].turn)
            and entry[3].part
            and not entry[3].is_issued
        ]
        return min(begun)[3] if begun else None
