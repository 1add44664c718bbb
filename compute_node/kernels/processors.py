"""How many processors this process may keep busy: its affinity and its control
groups' quotas.

More threads than the quota allows are all stopped together for the rest of each period.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from proto.process.control_groups import control_groups


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
    for group in control_groups("cpu", root):
        if group.is_v1:
            quota, period = (group.folder / f"cpu.cfs_{what}_us" for what in ("quota", "period"))
            yield from _quota(f"{_read(quota)} {_read(period)}")
        else:
            yield from _quota(_read(group.folder / "cpu.max"))


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
