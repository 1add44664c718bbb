"""The control groups of a box, version 1: how fast its processes read its disk, and how much memory
they have.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers.cgroup import own_group

_BLOCKS = Path("/sys/fs/cgroup/blkio")
_END_S = 20.0


@dataclass(frozen=True)
class Throttle:
    """Of reads."""

    bytes_per_s: int
    per_s: int


EDGE_SSD = Throttle(200_000_000, 20_000)
SD_CARD = Throttle(80_000_000, 2_000)


class BoxGroup:
    """name: the same in both hierarchies; major_minor: of the box's disk"""

    def __init__(self, name: str, major_minor: str) -> None:
        memory = own_group(Path("/proc/self/cgroup").read_text())
        self.folders = (_BLOCKS / name, memory / name)
        self._device = major_minor

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, started inside."""
        enter = " && ".join(f'echo $$ > "{one}/cgroup.procs"' for one in self.folders)
        return ["sh", "-c", f'{enter} && exec "$@"', "sh", *command]

    def throttle(self, speed: Throttle) -> None:
        """In force for reads that begin from now on."""
        rates = {"read_bps_device": speed.bytes_per_s, "read_iops_device": speed.per_s}
        for name, rate in rates.items():
            (self.folders[0] / f"blkio.throttle.{name}").write_text(f"{self._device} {rate}")

    @property
    def pids(self) -> list[int]:
        return _pids(self.folders[0])


@contextmanager
def box_group(
    name: str, major_minor: str, speed: Throttle, memory_bytes: int | None = None
) -> Iterator[BoxGroup]:
    """For the block; processes that are still inside at its end are killed. Raises OSError."""
    group = BoxGroup(name, major_minor)
    try:
        for folder in group.folders:
            folder.mkdir()
        group.throttle(speed)
        if memory_bytes is not None:
            (group.folders[1] / "memory.limit_in_bytes").write_text(str(memory_bytes))
        yield group
    finally:
        for folder in group.folders:
            remove(folder)


def remove(folder: Path) -> None:
    """A group, and the processes in it. Raises OSError when they do not end."""
    deadline = time.monotonic() + _END_S
    while folder.exists():
        for pid in _pids(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            (folder / "memory.force_empty").write_text("0")
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def leftovers(start: str) -> list[Path]:
    """Groups whose names begin so."""
    parents = (_BLOCKS, own_group(Path("/proc/self/cgroup").read_text()))
    return [path for parent in parents for path in parent.glob(f"{start}*")]


def why_not() -> str | None:
    """Why no such groups can be made here; None when they can."""
    if not (_BLOCKS / "blkio.throttle.read_bps_device").exists():
        return "the block controller is not mounted as cgroup version 1"
    return None


def _pids(folder: Path) -> list[int]:
    try:
        return [int(line) for line in (folder / "cgroup.procs").read_text().split()]
    except FileNotFoundError:
        return []
