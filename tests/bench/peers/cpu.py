"""How busy the machine was with others while an engine was measured: figures of a busy one say
little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def busy_s(stat: str) -> float:
    """All cores' time not spent idle, of the text of /proc/stat; time stolen by other virtual
    machines is in it.
    """
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def process_s(stat: str) -> float:
    """What a process and its ended children ran, of the text of /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()  # the name may hold anything
    return sum(int(field) for field in fields[11:15]) / _TICKS_PER_S


@dataclass(frozen=True)
class CpuMoment:
    """Seconds. ours: of given processes and of this one; kernel threads are others."""

    at: float
    busy: float
    ours: float

    @classmethod
    def now(cls, pids: Iterable[int]) -> CpuMoment:
        """pids: alive."""
        ours = sum(process_s(Path(f"/proc/{p}/stat").read_text()) for p in {*pids, os.getpid()})
        return cls(time.monotonic(), busy_s(Path("/proc/stat").read_text()), ours)

    def others_ratio(self, before: CpuMoment, num_cores: int) -> float:
        """Share of all cores that others took since `before`."""
        others = (self.busy - before.busy) - (self.ours - before.ours)
        return max(0.0, others) / ((self.at - before.at) * num_cores)
