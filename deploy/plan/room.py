"""Whether this machine has the memory that a plan takes."""

from __future__ import annotations

import shutil

import psutil

from deploy.plan import cgroup
from deploy.plan.budget import MemoryPlan
from deploy.plan.mebibytes import MIB, mib
from proto import errors


def check_machine(ceiling_bytes: int) -> None:
    """Raises MemoryExceeded when this machine or cgroup does not have so much."""
    total = psutil.virtual_memory().total
    if ceiling_bytes > total:
        raise errors.MemoryExceeded(
            f"--memory {mib(ceiling_bytes)} is more than this machine's {mib(total)}: lower it"
        )
    limit = cgroup.limit_bytes()
    if limit is not None and ceiling_bytes > limit:
        raise errors.MemoryExceeded(
            f"--memory {mib(ceiling_bytes)} is above this cgroup's limit of {mib(limit)}: "
            "lower it, or raise the limit"
        )


def check_room(plan: MemoryPlan) -> None:
    """Raises MemoryExceeded when the plan needs more memory than is available now: the kernel would
    take it from other processes, with SIGKILL.
    """
    if problem := shortage(plan):
        raise errors.MemoryExceeded(problem)
    check_shared_memory(plan)


def shortage(plan: MemoryPlan) -> str:
    """Why the plan does not fit beside what runs here now, and what would; empty when it fits."""
    launcher_bytes = plan.parts["launcher"]  # this process: it has its memory already
    fitting_bytes = cgroup.available_bytes() + launcher_bytes
    if plan.total_bytes <= fitting_bytes:
        return ""
    fact = (
        f"the stack takes {mib(plan.total_bytes)}, and only {fitting_bytes // MIB:,} MiB are "
        "available now beside what other processes hold"
    )
    if fitting_bytes < plan.smallest_bytes:
        return f"{fact}: end some, the smallest --memory that works is {mib(plan.smallest_bytes)}"
    return (
        f"{fact}: end some, or give --memory {fitting_bytes // MIB}MiB and no more "
        "--experts-memory than fits it"
    )


def check_shared_memory(plan: MemoryPlan) -> None:
    """Raises MemoryExceeded when /dev/shm has no room for the segment."""
    needed = plan.shared_bytes
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        raise errors.MemoryExceeded(
            f"expert slots need {mib(needed)} of /dev/shm, which has {mib(free)} free: mount it "
            "larger (mount -o remount,size=...), or give fewer experts memory"
        )
