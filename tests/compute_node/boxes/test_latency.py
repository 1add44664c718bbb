"""Planted faults seen red: late after the mean, late at once while nothing is known, size left
out.
"""

from __future__ import annotations

import pytest

from compute_node.boxes.latency import Latency, slow_s


def test_an_answer_is_late_after_three_times_what_nearly_all_take() -> None:
    latency = Latency()
    latency.tried(0.3)
    latency.tried(0.2)
    assert latency.late_s(1) == pytest.approx(0.9)
    for _ in range(15):
        latency.heard(0.1, 1)
    assert latency.late_s(1) == pytest.approx(0.9), "too little is known"
    for number in range(240):
        latency.heard(0.1 if number % 20 else 0.4, 1)
    assert latency.late_s(1) == pytest.approx(1.2)


def test_large_work_may_take_longer() -> None:
    latency = Latency()
    for _ in range(32):
        latency.heard(0.8, 4)
    assert latency.late_s(1) == pytest.approx(0.6)
    assert latency.late_s(4) == pytest.approx(2.4)


def test_a_few_that_took_ages_do_not_count() -> None:
    latency = Latency()
    for number in range(256):
        latency.heard(60.0 if number % 100 == 0 else 0.1, 1)
    assert latency.late_s(1) == pytest.approx(0.3)


def test_bounds() -> None:
    latency = Latency()
    assert latency.late_s(1) == 0.5, "nothing is known"
    for _ in range(32):
        latency.heard(0.0005, 1)
    assert latency.late_s(1) == 0.2
    for _ in range(32):
        latency.heard(20.0, 1)
    assert latency.late_s(1) == 30.0


def test_slow_is_slower_than_the_main_node_by_itself() -> None:
    assert slow_s(0.2) == pytest.approx(0.4)
    assert slow_s(0.001) == 0.05
    assert slow_s(0.0) == 30.0, "not known"
