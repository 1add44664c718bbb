"""Run-ahead rests where waits are too short for it or the processor is taken, and tries again.

Planted faults seen red: no probe, waits not looked at.
"""

from __future__ import annotations

from compute_node.run_ahead.worth import Worth


class Clocks:
    """share: of the time that passes, what this thread computes."""

    def __init__(self, share: float) -> None:
        self.now_s, self.share = 0.0, share

    def wall(self) -> float:
        return self.now_s

    def cpu(self) -> float:
        return self.now_s * self.share


def spend(worth: Worth, clocks: Clocks, times: int = 100) -> None:
    for _ in range(times):
        with worth.measured() as spent:
            clocks.now_s += 0.01
        assert abs(spent.seconds - 0.01) < 1e-9


def due(worth: Worth, tokens: int = 128, wait_s: float = 0.01) -> int:
    """How many of these tokens, each of which waits that long."""
    start_s = worth._waited_s
    return sum(worth.is_due(start_s + number * wait_s) for number in range(1, tokens + 1))


def test_a_processor_of_its_own() -> None:
    clocks = Clocks(1.0)
    worth = Worth(clocks.wall, clocks.cpu)
    spend(worth, clocks)
    assert due(worth) == 128


def test_a_processor_that_another_has_half_of() -> None:
    clocks = Clocks(0.5)
    worth = Worth(clocks.wall, clocks.cpu)
    spend(worth, clocks)
    assert due(worth) == 2, "probes"
    clocks = Clocks(1.0)
    worth.clock, worth.cpu_clock = clocks.wall, clocks.cpu
    spend(worth, clocks)
    assert due(worth) == 128, "it is free again"


def test_waits_too_short_to_see_anything() -> None:
    worth = Worth()
    for _ in range(100):
        worth.ended(foresaw=False)
    assert due(worth) == 2
    for _ in range(10):
        worth.ended(foresaw=True)
    assert due(worth) == 128


def test_no_waits() -> None:
    worth = Worth()
    assert due(worth, wait_s=0.0001) < 128
    assert due(worth, wait_s=0.0001) == 2, "probes"
    assert due(worth) > 100
