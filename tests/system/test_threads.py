"""The node's OpenMP threads: one team, the compute thread's, which tries kernels out as it uses
them.

Planted faults seen red: the model loaded on the main thread, which gives it a team of its own, or
by one thread, whose bits another number need not have; the compute thread never asks for any, or
asks for as many as its affinity allows beyond its quota.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from tests.daemons import DaemonProcess, daemon, node_table, store_table

NUM_THREADS = 5

pytestmark = pytest.mark.system


def test_only_the_compute_thread_has_a_team(tiny_store: Path, run_dir: Path) -> None:
    with daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 80)):
        alone = num_threads(run_dir, 1)
        assert num_threads(run_dir, NUM_THREADS) == alone + NUM_THREADS - 1
    # Where torch multiplies with AMX, decode was seen to have one thread less; verdicts say so.
    by_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    assert threads_tried(run_dir, NUM_THREADS) <= {NUM_THREADS, NUM_THREADS - by_amx}


@pytest.fixture
def one_processor() -> Iterator[None]:
    """What is started from this thread may use one, for the test."""
    group = Path(f"/sys/fs/cgroup/cpu/flashmoe-test-{os.getpid()}")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor is all there is")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group of version 1 with the cpu controller can be made here")
    (group / "cpu.cfs_quota_us").write_text("100000")
    own = str(threading.get_native_id())
    (group / "tasks").write_text(own)
    yield
    (group.parent / "tasks").write_text(own)
    group.rmdir()


def test_a_quota_is_followed(one_processor: None, tiny_store: Path, run_dir: Path) -> None:
    with daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 80)):
        num_threads(run_dir, 0)
    assert threads_tried(run_dir, 0) == {1}


def threads_tried(run_dir: Path, threads: int) -> set[int]:
    """With how many a node tried its kernels out."""
    events = map(json.loads, (run_dir / f"n{threads}.log").read_text().splitlines())
    return {event["threads"] for event in events if event["message"] == "kernel chosen"}


def num_threads(run_dir: Path, threads: int) -> int:
    """Of a node that answered a prompt, without those that gRPC names."""
    table = node_table(run_dir, f"n{threads}", 40, threads=threads)
    with daemon("compute_node", run_dir, table, f"n{threads}") as node:
        with NodeClient(node.address) as client:
            client.generate("Once upon a time", max_tokens=4).run()
        looks = []
        for _ in range(10):  # some end just then
            looks.append(sum(name.startswith("python") for name in thread_names(node)))
            time.sleep(0.1)
        return min(looks)


def thread_names(node: DaemonProcess) -> list[str]:
    found = []
    for task in Path(f"/proc/{node.process.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended between two looks
            found.append((task / "comm").read_text())
    return found
