"""Planted faults seen red: late after the mean, late at once while nothing is known."""

from __future__ import annotations

import pytest

from compute_node.boxes.latency import Latency


def test_an_answer_is_late_after_three_times_what_nearly_all_take() -> None:
    latency = Latency()
    assert latency.late_s == 5.0
    for _ in range(15):
        latency.heard(0.1)
    assert latency.late_s == 5.0, "too little is known"
    for number in range(240):
        latency.heard(0.1 if number % 20 else 0.3)
    assert latency.late_s == pytest.approx(0.9)


def test_a_fast_worker_has_50_ms() -> None:
    latency = Latency()
    for _ in range(32):
        latency.heard(0.0005)
    assert latency.late_s == 0.05
