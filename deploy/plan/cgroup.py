"""What the memory cgroups of this process allow, v1 and v2, its own and those above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup that limits memory. used_bytes: less page cache, which gives way."""

    limit_bytes: int
    used_bytes: int


def memory_groups() -> Iterator[MemoryGroup]:
    """Those with a limit, from this process's own upwards."""
    for is_v1, path in _memberships():
        for group in (path, *path.parents):
            if is_v1:
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
                yield from _group(Path(f"{_ROOT}/memory{group}"), *names)
            else:
                yield from _group(Path(f"{_ROOT}{group}"), "memory.max", "memory.current", "")


def _memberships() -> Iterator[tuple[bool, Path]]:
    """Whether it is of v1, and its path below the hierarchy: of each that may limit memory."""
    for line in _MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("memory", ""):
            yield controllers == "memory", Path(path)


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
    for is_v1, path in _memberships():
        name = "memory.max_usage_in_bytes" if is_v1 else "memory.peak"
        peak = _number(Path(f"{_ROOT}{'/memory' if is_v1 else ''}{path}/{name}"))
        if path != Path("/") and peak is not None:
            return peak
    return None


def available_bytes() -> int:
    """What processes here may take now: page cache that gives way counts, swap does not."""
    import psutil  # clients of a stack, who read its memory report, need none of it

    rooms = (group.limit_bytes - group.used_bytes for group in memory_groups())
    return max(0, min([psutil.virtual_memory().available, *rooms]))
