"""How many processors this process may keep busy: its affinity and its control
groups' quotas.

More threads than the quota allows are all stopped together for the rest of each period.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable(root: Path = Path("/")) -> int:
    """Threads that can compute at once. root: where /proc and /sys are"""
    allowed = len(os.sched_getaffinity(0))
    quota = quota_processors(root)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def quota_processors(root: Path = Path("/")) -> float | None:
    """The smallest quota of the control groups (v1 or v2) that this process is in, in processors;
    None without one.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    hierarchies = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        # In a container the path may be the host's, while what is mounted begins at its own group.
        for group in (Path(own), *Path(own).parents):
            within = group.relative_to("/")
            if not controllers:
                for mount in (hierarchies, hierarchies / "unified"):
                    yield from _quota(_read(mount / within / "cpu.max"))
            elif "cpu" in controllers.split(","):
                for name in {"cpu", controllers}:
                    folder = hierarchies / name / within
                    quota, period = (f"cpu.cfs_{what}_us" for what in ("quota", "period"))
                    yield from _quota(f"{_read(folder / quota)} {_read(folder / period)}")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # no such controller, or a group that has gone meanwhile
        return ""


def _quota(text: str) -> Iterator[float]:
    """text: microseconds of processor time, and in how many; `max` or -1 is without limit"""
    match text.split():
        case [quota, period] if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)
