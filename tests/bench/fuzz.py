"""A million exchanges of a node gone mad, and whether the store is as it was."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from proto.process import log
from tests.bench.table import show
from tests.expert_store.fuzz import OPEN, fuzz
from tests.expert_store.raw_session import Wire
from tests.expert_store.stores import FILE_NAME, KEYS, expert_range, flip, write_store
from tests.local_store import local_store

NUM_MESSAGES, PART = 1_000_000, 100_000
NUM_SLOTS, READ_DEPTH = 8, 2


def main(folder: Path) -> None:
    """The store runs in this process: what it leaks is seen as this process's memory."""
    log.configure("CRITICAL")
    write_store(folder / "store")
    flip(folder / "store" / FILE_NAME, expert_range(KEYS[-1])[77])
    settings = {"read_depth": READ_DEPTH, "lock_poll_s": 0.01}
    rows = []
    with (
        local_store(folder / "store", folder, NUM_SLOTS, **settings) as address,
        Wire(address, folder) as wire,
    ):
        for seed in range(NUM_MESSAGES // PART):
            start_s = time.perf_counter()
            ends = fuzz(wire, PART, seed)
            stats = wire.until_idle()
            assert stats.slots_free + stats.slots_reclaimable == NUM_SLOTS
            rss_bytes = psutil.Process().memory_info().rss
            passed_s = time.perf_counter() - start_s
            threads = psutil.Process().num_threads()
            kept = ends[OPEN]
            rows.append([seed, sum(ends.values()), kept, int(passed_s), rss_bytes >> 20, threads])
    show(
        f"{PART:,} fuzzed exchanges a row",
        ["seed", "sessions", "not ended by an error", "s", "RSS MiB", "threads"],
        rows,
    )
