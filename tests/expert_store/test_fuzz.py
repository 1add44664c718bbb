"""Ten thousand exchanges of a node gone mad inside open sessions; a million are in tests/bench.

Planted fault seen red: bytes that are no exchange ending the local socket's thread.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.expert_store.conftest import check_healthy
from tests.expert_store.fuzz import OPEN, fuzz
from tests.expert_store.raw_session import Wire

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
