"""Off a terminal, a line now and then.

Faults seen red: nothing at all, for the hour that a large checkpoint takes; the speed since the
start, which counts what an earlier run had done.
"""

from __future__ import annotations

import pytest

from deploy.terminal.progress import Lines, NowAndThen, duration, progress

MIB = 1 << 20


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_line_an_interval_with_the_speed_of_late() -> None:
    clock, said = Clock(), []
    lines = Lines("indexing", said.append, NowAndThen(clock))
    lines.report(0, 400 * MIB)
    for clock.now_s, done in ((5, 50), (10, 100), (12, 110), (20, 120), (21, 130)):
        lines.report(done * MIB, 400 * MIB)
    assert said == [
        "indexing: 100.0 MiB of 400.0 MiB (25%), 10.0 MiB/s, 0:30 left",
        "indexing: 120.0 MiB of 400.0 MiB (30%), 2.0 MiB/s, 2:20 left",
    ]


def test_another_part_of_the_work_begins_from_nothing() -> None:
    clock, said = Clock(), []
    lines = Lines("packing", said.append, NowAndThen(clock))
    for clock.now_s, done in ((10, 100), (20, 50)):
        lines.report(done * MIB, 200 * MIB)
    assert said[1] == "packing: 50.0 MiB of 200.0 MiB (25%), 5.0 MiB/s, 0:30 left"


def test_work_that_stands_still_says_so_without_a_time() -> None:
    clock, said = Clock(), []
    lines = Lines("packing", said.append, NowAndThen(clock))
    clock.now_s = 10
    lines.report(0, 200 * MIB)
    assert said == ["packing: 0 bytes of 200.0 MiB (0%), 0 bytes/s"]


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("indexing") as report:
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_durations() -> None:
    assert [duration(s) for s in (0, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
