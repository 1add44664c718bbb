"""Processors that affinity and quotas leave, read from real control groups and from trees of both
versions.

Planted faults seen red: affinity alone, the group's own quota alone (a parent's is smaller), half a
processor rounded down to none, version 2 left out, a container's path looked up as the host's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_node.kernels import processors
from tests.stack import ROOT

V1 = Path("/sys/fs/cgroup/cpu")


def tree(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A /proc and /sys below `root`."""
    files = {"proc/self/cgroup": membership} | {
        f"sys/fs/cgroup/{name}": text for name, text in files.items()
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v1(folder: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {
        f"{folder}/cpu.cfs_quota_us": str(quota_us),
        f"{folder}/cpu.cfs_period_us": str(period_us),
    }


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {}, None),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),  # as a container sees its own
        ("1:cpu:/a", v1("cpu/a", -1), None),
        ("1:cpu:/a", v1("cpu/a", 300_000), 3.0),
        (
            "4:cpu,cpuacct:/a/b",
            v1("cpu,cpuacct/a/b", -1) | v1("cpu,cpuacct/a", 25_000, 50_000),
            0.5,
        ),
        ("4:cpuacct,cpu:/docker/0123", v1("cpu", 100_000), 1.0),  # mounted from its own group on
        ("5:cpuset:/a\n1:memory:/a", v1("cpuset/a", 100_000), None),
        ("1:cpu:/a\n0::/b", v1("cpu/a", 200_000) | {"unified/b/cpu.max": "100000 100000"}, 1.0),
        ("0::/a:b", {"a:b/cpu.max": "70000 100000"}, 0.7),
    ],
)
def test_the_smallest_quota_counts(
    membership: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    root = tree(tmp_path, membership, files)
    assert processors.quota_processors(root) == quota
    allowed = len(os.sched_getaffinity(0))
    rounded_up = allowed if quota is None else -int(-quota // 1)
    assert processors.usable(root) == max(1, min(allowed, rounded_up))


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of version 1 with a quota of one processor and a half, and one below it."""
    parent = V1 / f"flashmoe-test-{os.getpid()}"
    try:
        (parent / "child").mkdir(parents=True)
    except OSError:
        pytest.skip("no control group of version 1 with the cpu controller can be made here")
    (parent / "cpu.cfs_quota_us").write_text("150000")
    yield parent / "child"
    (parent / "child").rmdir()
    parent.rmdir()


def test_a_real_quota_is_followed(group: Path) -> None:
    program = (
        "from compute_node.kernels import processors as p; print(p.quota_processors(), p.usable());"
        "from deploy.verbs.doctor import check_threads; print(check_threads().fact)"
    )
    joined = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]
    command = [*joined, sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    numbers, fact = found.stdout.splitlines()
    threads = min(2, len(os.sched_getaffinity(0)))
    assert numbers == f"1.5 {threads}"
    assert fact.startswith(f"{threads} cores for this process, load ")
    assert fact.endswith(", cgroup quota of 1.5 processors")
