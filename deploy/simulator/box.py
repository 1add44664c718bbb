"""A simulated box: what it has, and what it has done."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.simulator.disk import Disk
from deploy.simulator.expert_cache import ExpertCache
from expert_store.manifest.share import Share


@dataclass(frozen=True)
class BoxSpec:
    """memory_bytes: for experts

    disk_bytes_per_s, disk_read_s: of its disk, and of a read beside its bytes
    weights_bytes_per_s: that it multiplies with; expert_s: of an expert beside its bytes
    cost:  of an expert there over one on the main box, by which it is given fewer
    watts: always; computing_watts, reading_watts: more while it does
    share: of the experts, that its disk has; None: all
    """

    name: str
    memory_bytes: float
    disk_bytes_per_s: float
    weights_bytes_per_s: float
    disk_read_s: float = 0.0
    expert_s: float = 0.0
    cost: float = 1.0
    watts: float = 0.0
    computing_watts: float = 0.0
    reading_watts: float = 0.0
    share: Share | None = None

    def slots(self, expert_bytes: float) -> int:
        return int(self.memory_bytes // expert_bytes)


@dataclass
class Box:
    """busy_s: that its processor has computed experts, or a main box's dense part"""

    spec: BoxSpec
    disk: Disk
    cache: ExpertCache
    expert_s: float
    busy_s: float = 0.0

    @classmethod
    def of(cls, spec: BoxSpec, expert_bytes: float, top_k: int) -> Box:
        """Raises MemoryExceeded where one layer of a token does not fit."""
        disk = Disk(spec.disk_bytes_per_s, spec.disk_read_s, expert_bytes)
        cache = ExpertCache(spec.slots(expert_bytes), top_k, disk)
        return cls(spec, disk, cache, spec.expert_s + expert_bytes / spec.weights_bytes_per_s)

    def joules(self, wall_s: float) -> float:
        """Since nothing was done, which is wall_s ago."""
        spec = self.spec
        computing, reading = (
            spec.computing_watts * self.busy_s,
            spec.reading_watts * self.disk.busy_s,
        )
        return spec.watts * wall_s + computing + reading


@dataclass
class Work:
    """Experts that a box computes from start_s on, each once it is there. ends_s: of the last"""

    box: Box
    start_s: float
    there_s: Sequence[float]
    ends_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.ends_s = self.start_s


class Processors:
    """count: that all boxes share, as in a laboratory on one machine; None: each box has its own,
    for its one thread.
    """

    def __init__(self, count: int | None = None) -> None:
        self._free_s = [0.0] * count if count else None

    def compute(self, works: Sequence[Work]) -> None:
        """What one layer gives to several boxes at once; sets when each ends."""
        turns = [(work.start_s, number, sorted(work.there_s)) for number, work in enumerate(works)]
        turns = [(max(now_s, left[0]), number, left) for now_s, number, left in turns if left]
        heapq.heapify(turns)
        while turns:
            ready_s, number, left = heapq.heappop(turns)
            work = works[number]
            end_s = self.run(work.box, ready_s, work.box.expert_s)
            work.ends_s = end_s
            if len(left) > 1:
                heapq.heappush(turns, (max(end_s, left[1]), number, left[1:]))

    def run(self, box: Box, from_s: float, takes_s: float) -> float:
        """When the box has computed for so long, from then on."""
        box.busy_s += takes_s
        if self._free_s is None:
            return from_s + takes_s
        end_s = max(from_s, heapq.heappop(self._free_s)) + takes_s
        heapq.heappush(self._free_s, end_s)
        return end_s
