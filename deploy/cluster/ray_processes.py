"""Ray's own processes on this box, as an actor sees them: its parent is the raylet."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

_START = "ray.scripts.scripts"  # in the command line of the process that started the raylet


def environment_of_raylet() -> dict[str, str]:
    """That of `ray start`, without Ray's own variables. An actor's own has other numbers of
    threads, and with them a stack would compute other bits.
    """
    data = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    pairs = (entry.partition(b"=") for entry in data.split(b"\0") if entry)
    found = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return {name: value for name, value in found.items() if not name.startswith("RAY_")}


def ray_pss_bytes() -> int:
    """Of all of Ray on this box: raylet, agents, actors, and at the head its Valkey and what else
    runs there.
    """
    raylet = psutil.Process(os.getppid())
    parent, root = raylet.parent(), raylet
    if parent is not None and _START in " ".join(parent.cmdline()):
        root = parent
    return sum(_pss_bytes(process) for process in (root, *root.children(recursive=True)))


def _pss_bytes(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return int(process.memory_full_info().pss)
    return 0
