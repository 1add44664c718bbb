"""The node's OpenMP threads: one team, the compute thread's.

Planted faults seen red: the main thread loads with the configured number of threads, which gives it
a team of its own; the compute thread never asks for any.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_node.client import NodeClient
from tests.daemons import DaemonProcess, daemon, node_table, store_table

NUM_THREADS = 5

pytestmark = pytest.mark.system


def test_only_the_compute_thread_has_a_team(tiny_store: Path, run_dir: Path) -> None:
    with daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 80)):
        alone = num_threads(run_dir, 1)
        assert num_threads(run_dir, NUM_THREADS) == alone + NUM_THREADS - 1


def num_threads(run_dir: Path, threads: int) -> int:
    """Of a node that answered a prompt, without those that gRPC names."""
    table = node_table(run_dir, f"n{threads}", 40, threads=threads)
    with daemon("compute_node", run_dir, table, f"n{threads}") as node:
        with NodeClient(node.address) as client:
            client.generate("Once upon a time", max_tokens=4).run()
        return sum(name.startswith("python") for name in thread_names(node))


def thread_names(node: DaemonProcess) -> list[str]:
    tasks = Path(f"/proc/{node.process.pid}/task").iterdir()
    return [(task / "comm").read_text() for task in tasks]
