"""What the memory cgroups of this process allow, v1 and v2, its own and those above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proto.process.control_groups import control_groups

_SYSTEM = Path("/")


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup that limits memory. used_bytes: less page cache, which gives way."""

    limit_bytes: int
    used_bytes: int


def memory_groups() -> Iterator[MemoryGroup]:
    """The groups with a limit, from this process's own upwards."""
    for group in control_groups("memory", _SYSTEM):
        if group.is_v1:
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            names = "memory.max", "memory.current", ""
        yield from _group(group.folder, *names)


def _group(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[MemoryGroup]:
    """prefix: of the fields of memory.stat that count what is below the group too"""
    limit_bytes = _number(folder / limit)
    if limit_bytes is None or limit_bytes >= 1 << 62:
        return
    cache_bytes = 0
    for line in _text(folder / "memory.stat").splitlines():
        name, count = line.split()
        if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
            cache_bytes += int(count)
    yield MemoryGroup(limit_bytes, max(0, (_number(folder / usage) or 0) - cache_bytes))


def _number(file: Path) -> int | None:
    """None where there is no limit, or no such file."""
    text = _text(file)
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def limit_bytes() -> int | None:
    """The memory limit this process runs under; None without one."""
    return min((group.limit_bytes for group in memory_groups()), default=None)


def peak_bytes() -> int | None:
    """The highest use of a cgroup of this process's own; None when it has none."""
    for group in control_groups("memory", _SYSTEM):
        name = "memory.max_usage_in_bytes" if group.is_v1 else "memory.peak"
        if group.is_own and (peak := _number(group.folder / name)) is not None:
            return peak
    return None


def available_bytes() -> int:
    """What processes here may take now: page cache that gives way counts, swap does not."""
    import psutil  # clients of a stack, who read its memory report, need none of it

    rooms = (group.limit_bytes - group.used_bytes for group in memory_groups())
    return max(0, min([psutil.virtual_memory().available, *rooms]))
