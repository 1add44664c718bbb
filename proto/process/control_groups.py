"""The control groups that limit this process: launcher and node must find the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ControlGroup:
    """A folder that may hold a controller's limit.

    is_v1:  in a hierarchy of version 1, else in the unified one
    is_own: the group that this process is in, unless that is the topmost
    """

    folder: Path
    is_v1: bool
    is_own: bool


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[ControlGroup]:
    """The groups that limit this process by `controller`, its own first, then those above.

    Folders need not exist: in a container the path may be the host's, while what is mounted begins
    at the container's own group.

    root: where /proc and /sys are
    """
    hierarchies = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        names = {controller, controllers} if controllers else {".", "unified"}
        for group in (Path(own), *Path(own).parents):
            for name in names:
                folder = hierarchies / name / group.relative_to("/")
                is_own = group == Path(own) != Path("/")
                yield ControlGroup(folder, bool(controllers), is_own)
