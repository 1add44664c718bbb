"""Ten thousand exchanges of a node gone mad inside open sessions; a million are in tests/bench.

Planted faults seen red: bytes that are no exchange ending the local socket's thread, a slot taken
back while a part of it is lent, a slot that counts a lease that was given back.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.expert_store.conftest import NUM_SLOTS, READ_DEPTH, check_healthy
from tests.expert_store.fuzz import OPEN, fuzz
from tests.expert_store.raw_session import Lock, Wire
from tests.expert_store.stores import KEYS, small_keys, with_small_variant, write_store
from tests.local_store import local_store

NUM_MESSAGES = 10_000


def test_any_exchanges_of_open_sessions(
    wire: Wire, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = fuzz(wire, NUM_MESSAGES, seed=11)
    assert ends[OPEN] > 10 and ends["InvalidRequest"] > 10, ends
    assert sum(ends.values()) < NUM_MESSAGES / 20, "most of what it says is sound"
    check_healthy(wire, folder)
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert {record.getMessage() for record in told} <= {"expert quarantined"}
    assert not any(record.exc_info for record in caplog.records)


def test_any_exchanges_about_records_of_two_sizes(run_dir: Path) -> None:
    """Slots are divided, taken back and found too full; none is lost by it."""
    write_store(run_dir / "store")
    with_small_variant(run_dir / "store")
    with (
        local_store(
            run_dir / "store", run_dir, NUM_SLOTS, read_depth=READ_DEPTH, lock_poll_s=0.01
        ) as address,
        Wire(address, run_dir) as wire,
    ):
        ends = fuzz(wire, NUM_MESSAGES // 4, 12, [*KEYS, *small_keys()])
        assert ends[OPEN] > 3, ends
        stats = wire.until_idle()
        assert stats.slots_free + stats.slots_reclaimable == NUM_SLOTS
        with Lock(wire.session_dir, "after.lock") as lock:
            session, _ = wire.open_shared(lock, NUM_SLOTS - READ_DEPTH)
            with session:
                leases = session.exchange(KEYS[: NUM_SLOTS - READ_DEPTH])
                assert not any(lease.HasField("error") for lease in leases)
            lock.let_go()
        wire.until_idle()
