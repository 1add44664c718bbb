"""Several boxes on one machine: network namespaces joined by links with delay and rate, each with a
loop device that is as slow as an edge box's disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.bench.peers import cgroup as memory_groups
from tests.bench.peers import disk as loop_devices
from tests.boxlab import group as groups
from tests.boxlab import switch as switches
from tests.boxlab.box import Box
from tests.boxlab.disk import mounted, run, unmount_below
from tests.boxlab.group import EDGE_SSD, Throttle, box_group
from tests.boxlab.switch import GIGABIT, Link, switch

_NAME = "fmlab"
_NAMESPACES = Path("/run/netns")
_NETWORK = "10.77.0"


@contextmanager
def laboratory(
    images: list[Path],
    link: Link = GIGABIT,
    speed: Throttle = EDGE_SSD,
    memory_bytes: int | None = None,
) -> Iterator[list[Box]]:
    """A box an image, for the block; nothing of it is left behind, and what killed laboratories
    left is removed first. An image that is named several times is mounted read-only.

    memory_bytes: limit of each box
    Raises OSError.
    """
    sweep()
    with ExitStack() as stack:
        owner = f"{_NAME}-{os.getpid()}-{_started(os.getpid())}"
        root = Path(tempfile.gettempdir()) / owner
        root.mkdir()
        stack.callback(shutil.rmtree, root)
        addresses = {f"{owner}-{n}": f"{_NETWORK}.{n + 1}" for n in range(len(images))}
        for name in addresses:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
        joined = stack.enter_context(switch(addresses, root))
        boxes = []
        for (name, host), image in zip(addresses.items(), images, strict=True):
            _give_address(name, host)
            joined.set(name, link)
            folder = root / name.rsplit("-", 1)[1]
            shared = images.count(image) > 1
            disk = stack.enter_context(mounted(image, folder / "disk", shared=shared))
            group = box_group(name, disk.major_minor, speed, memory_bytes)
            in_group = stack.enter_context(group)
            boxes.append(Box(name, folder, host, disk, in_group, joined, link, speed))
        yield boxes


def why_not() -> str | None:
    """Why there can be no laboratory here; None when there can."""
    parts = (loop_devices, switches, groups, memory_groups)
    return next((reason for part in parts if (reason := part.why_not())), None)


def sweep() -> None:
    """Remove what laboratories of processes that have ended left behind."""
    left = [path for path in leftovers() if _is_orphan(path.name)]
    for path in left:
        if path.parent == _NAMESPACES:
            run("ip", "netns", "delete", path.name)
        elif path.parent == Path(tempfile.gettempdir()):
            unmount_below(path)
            shutil.rmtree(path)
        else:
            groups.remove(path)


def leftovers(owner: str = f"{_NAME}-") -> list[Path]:
    """Groups, folders and namespaces of laboratories: first the groups, whose processes use the
    rest. owner: how their names begin
    """
    folders = (Path(tempfile.gettempdir()), _NAMESPACES)
    found = groups.leftovers(owner)
    return found + [path for folder in folders for path in sorted(folder.glob(f"{owner}*"))]


def _give_address(name: str, host: str) -> None:
    run("ip", "-n", name, "link", "set", "lo", "up")
    run("ip", "-n", name, "address", "add", f"{host}/24", "dev", "box0")
    run("ip", "-n", name, "link", "set", "box0", "up")


def _is_orphan(name: str) -> bool:
    pid, started = name.split("-")[1:3]
    return not psutil.pid_exists(int(pid)) or _started(int(pid)) != int(started)


def _started(pid: int) -> int:
    """When, in ticks of the kernel: tells a process from a later one of the same number."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
