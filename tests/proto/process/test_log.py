"""A log that somebody can read: each line once, a flood as a count.

Planted faults seen red: no limit, counts lost at the end, counts that stay for ever, one limit for
all places together, or for all levels.
"""

from __future__ import annotations

import io
import json
import logging

from pythonjsonlogger.json import JsonFormatter

from proto.process.log import LINES_A_PERIOD, PERIOD_S, WARNINGS_A_PERIOD, CountingHandler


class Log:
    """A handler on a clock of its own, and what it wrote."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.handler = CountingHandler(lambda: self.now_s)
        self._written = io.StringIO()
        self.handler.setStream(self._written)
        self.handler.setFormatter(JsonFormatter("%(message)s"))
        self.logger = logging.Logger("daemon")
        self.logger.addHandler(self.handler)

    def flood(self, count: int) -> None:
        for _ in range(count):
            self.logger.warning("undecodable request")

    def lines(self) -> list[dict[str, object]]:
        """Written since the last time."""
        lines = [json.loads(line) for line in self._written.getvalue().splitlines()]
        self._written.truncate(0)
        self._written.seek(0)
        return lines


FLOOD = {"message": "undecodable request"}


def left_out(count: int) -> dict[str, object]:
    return {"message": "lines left out", "event": "undecodable request", "left_out": count}


def test_a_flood_is_some_lines_and_a_count() -> None:
    log = Log()
    log.flood(100_000)
    assert log.lines() == [FLOOD] * WARNINGS_A_PERIOD
    log.now_s += PERIOD_S
    log.logger.info("ready")
    assert log.lines() == [left_out(100_000 - WARNINGS_A_PERIOD), {"message": "ready"}]
    log.flood(WARNINGS_A_PERIOD + 1)
    log.handler.close()
    assert log.lines() == [FLOOD] * WARNINGS_A_PERIOD + [left_out(1)]
    log.handler.close()
    assert log.lines() == [], "a count is told once"


def test_a_flood_hides_nothing_else() -> None:
    log = Log()
    log.flood(1000)
    log.logger.error("expert quarantined")
    assert log.lines()[-1] == {"message": "expert quarantined"}


def test_what_warns_of_nothing_may_say_more() -> None:
    """As a start does: a line for each shape of matrix."""
    log = Log()
    log.logger.setLevel(logging.INFO)
    for _ in range(LINES_A_PERIOD + 1):
        log.logger.info("kernel chosen")
    assert log.lines() == [{"message": "kernel chosen"}] * LINES_A_PERIOD


def test_what_stays_below_the_limit_is_not_counted() -> None:
    log = Log()
    for _ in range(5):
        log.flood(WARNINGS_A_PERIOD)
        log.now_s += PERIOD_S
    log.handler.close()
    assert log.lines() == [FLOOD] * 5 * WARNINGS_A_PERIOD
