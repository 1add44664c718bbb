"""The doctor verb: what on this machine stands in the way, and what to do about it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.text import Text

from compute_node.kernels import processors
from compute_node.native import binding
from deploy.plan import cgroup
from deploy.plan.disk import measure_disk
from deploy.stack import leftovers
from deploy.terminal import console
from expert_store.io import huge_pages

_PROBE_BYTES = 64 * 1024 * 1024
_PATTERN_BYTES = 4 * 1024 * 1024
_SLOW_BYTES_PER_S = 500e6


@dataclass(frozen=True)
class Finding:
    """remedy: empty when all is well."""

    name: str
    fact: str
    remedy: str = ""


def doctor(
    path: Annotated[
        Path, typer.Option(help="A folder on the disk that holds (or will hold) the experts.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check disk speed, direct I/O, /dev/shm, huge pages, cgroup limit, threads and matrix kernel;
    exit 1 when something is wrong.

    Example: flashmoe doctor --path /nvme
    """
    findings = [
        *check_disk(path),
        check_shm(),
        check_huge_pages(),
        check_memory(),
        check_threads(),
        check_kernel(),
        check_files(),
        check_leftovers(),
    ]
    if as_json:
        console.print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            mark = Text("!", "yellow") if finding.remedy else Text("ok", "green")
            console.out.print(mark, f"{finding.name}: {finding.fact}")
            if finding.remedy:
                console.out.print(f"   do: {finding.remedy}")
    if any(finding.remedy for finding in findings):
        raise typer.Exit(console.DAMAGED)


def check_disk(path: Path) -> Iterator[Finding]:
    """A probe file of 64 MiB, written, synced, and read back in random pieces."""
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".flashmoe-doctor-") as probe:
            probe.write(os.urandom(_PATTERN_BYTES) * (_PROBE_BYTES // _PATTERN_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
            os.posix_fadvise(probe.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield from _probe(Path(probe.name))
    except OSError as error:
        remedy = "give another --path"
        if error.errno == errno.EROFS:  # as all mounts of our containers
            remedy += "; in a container, run doctor on the host instead"
        yield Finding("disk", f"cannot write to {path.resolve()}: {error.strerror}", remedy)


def _probe(file: Path) -> Iterator[Finding]:
    speed = measure_disk([file])
    if speed.obstacle:
        yield Finding(
            "direct I/O",
            f"refused ({speed.obstacle}): reads go through the page cache",
            "keep the experts on ext4, xfs or btrfs, not on tmpfs, overlayfs or a network share",
        )
    else:
        yield Finding("direct I/O", "works")
    slow = speed.bytes_per_s < _SLOW_BYTES_PER_S
    yield Finding(
        "disk", str(speed), "decode will wait for this disk: use an NVMe SSD" if slow else ""
    )


def check_shm() -> Finding:
    folder = _shared_memory()
    usage = shutil.disk_usage(folder)
    fact = f"{console.size(usage.free)} free of {console.size(usage.total)}"
    remedy = "experts live there: mount it larger" if usage.free < 1 << 30 else ""
    return Finding(folder, fact, remedy)


def _shared_memory() -> str:
    """Where the experts' segment lies: docker-compose.yml mounts a volume for it."""
    return "/segment" if os.path.ismount("/segment") else "/dev/shm"


def check_huge_pages() -> Finding:
    """Never wrong: without them some disks are half as fast, and nothing else changes."""
    try:
        with tempfile.TemporaryFile(dir=_shared_memory()) as file:
            gathered_bytes = huge_pages.allocate(file.fileno(), huge_pages.HUGE_BYTES)
    except OSError as error:
        return Finding("huge pages", f"not tried ({error.strerror})")
    if gathered_bytes:
        return Finding("huge pages", "experts' memory is laid out in them")
    return Finding("huge pages", "not given (Linux from 6.1 on has them): some disks read slower")


def check_memory() -> Finding:
    memory, limit = psutil.virtual_memory(), cgroup.limit_bytes()
    fact = f"{console.size(memory.available)} available of {console.size(memory.total)}"
    fact += f", cgroup limit {console.size(limit)}" if limit else ", no cgroup limit"
    if psutil.swap_memory().used > 64 << 20:
        return Finding(
            "memory", fact + ", swap in use", "stop what swaps: experts would be paged out"
        )
    if memory.available < 1 << 30:
        return Finding("memory", fact, "less than 1 GiB: close other programs")
    low = limit is not None and limit < 1 << 30
    remedy = "the limit is below 1 GiB: raise it, or run doctor on the host when in a container"
    return Finding("memory", fact, remedy if low else "")


def check_threads() -> Finding:
    allowed, wanted = processors.usable(), os.environ.get("OMP_NUM_THREADS")
    load, quota = os.getloadavg()[0], processors.quota_processors()
    fact = f"{allowed} cores for this process, load {load:.1f}"
    if quota is not None:
        fact += f", cgroup quota of {quota:g} processors"
    if wanted and wanted.isdigit() and int(wanted) > allowed:
        return Finding("threads", f"{fact}, OMP_NUM_THREADS={wanted}", "unset OMP_NUM_THREADS")
    busy = load > 1.5 * allowed
    return Finding("threads", fact, "others use these cores: decode will be slower" if busy else "")


def check_kernel() -> Finding:
    """Which kernels compute; which shapes they take, a node finds out and logs."""
    remedy = "install a C compiler (gcc) and run `pip install` of FlashMoE again"
    return Finding("matrix kernel", binding.in_charge(), remedy if binding.obstacle() else "")


def check_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = "raise it: ulimit -n 4096" if soft < 256 else ""
    return Finding("open files", f"limit {soft}", remedy)


def check_leftovers() -> Finding:
    """Of killed stacks; the next start removes them."""
    found = leftovers.find()
    taken_bytes = sum(leftover.size_bytes for leftover in found)
    if not taken_bytes:
        return Finding("leftovers", "no killed stack left anything behind")
    paths = ", ".join(str(leftover.path) for leftover in found)
    fact = f"killed stacks left {console.size(taken_bytes)}: {paths}"
    return Finding("leftovers", fact, "the next `flashmoe serve` or `run` removes them")
