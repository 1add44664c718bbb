"""A memory limit around all processes of an engine: a memory cgroup, version 1."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup/memory")
_END_S = 10.0


class MemoryGroup:
    """One cgroup. What is started by `command` and what that starts counts against its limit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, started inside."""
        enter = f'echo $$ > "{self.path}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *command]

    @property
    def pids(self) -> list[int]:
        """Of its processes now."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    @property
    def major_faults(self) -> int:
        """Of all its processes, dead ones included."""
        return self._stat("pgmajfault")

    @property
    def peak_bytes(self) -> int:
        return int((self.path / "memory.max_usage_in_bytes").read_text())

    @property
    def num_killed(self) -> int:
        """Processes that the kernel ended because the limit could not be kept."""
        return parse_stat((self.path / "memory.oom_control").read_text())["oom_kill"]

    def _stat(self, name: str) -> int:
        return parse_stat((self.path / "memory.stat").read_text())[name]


def parse_stat(text: str) -> dict[str, int]:
    """Lines of `name value`."""
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def own_group(cgroups: str) -> Path:
    """Where a process of this /proc/PID/cgroup is in the memory hierarchy.

    Raises LookupError when that is not managed by version 1.
    """
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _MOUNT / path.lstrip("/")
    raise LookupError("the memory controller is not mounted as cgroup version 1")


def why_not() -> str | None:
    """Why no limit can be set here; None when one can."""
    try:
        parent = own_group(Path("/proc/self/cgroup").read_text())
        probe = parent / f"flashmoe-probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except (LookupError, OSError) as error:
        return f"memory cgroups cannot be written ({error})"
    return None


@contextmanager
def memory_group(limit_bytes: int | None) -> Iterator[MemoryGroup]:
    """A new cgroup below this process's own, for the block; None: counted, not limited."""
    parent = own_group(Path("/proc/self/cgroup").read_text())
    group = MemoryGroup(parent / "flashmoe-peers")
    if group.path.exists():  # a killed run left it
        _remove(group.path)
    group.path.mkdir()
    try:
        if limit_bytes is not None:
            (group.path / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        _remove(group.path)


def _remove(path: Path) -> None:
    """Its processes have ended; their last accounting may take a moment."""
    deadline = time.monotonic() + _END_S
    while True:
        with suppress(OSError):
            (path / "memory.force_empty").write_text("0")
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
