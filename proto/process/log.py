"""A daemon's log: JSON lines on stderr, a limited number of each kind."""

from __future__ import annotations

import logging
import logging.config
import time
from collections.abc import Callable
from dataclasses import dataclass

PERIOD_S = 10.0
WARNINGS_A_PERIOD, LINES_A_PERIOD = 10, 100  # a start logs one line a shape of matrix


@dataclass
class _Event:
    """What one place in the code logged in this period."""

    last: logging.LogRecord
    count: int = 0

    @property
    def most(self) -> int:
        """Lines that are written."""
        return WARNINGS_A_PERIOD if self.last.levelno >= logging.WARNING else LINES_A_PERIOD


class CountingHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in stubs only
    """Writes a limited number of lines a period from each place in the code, and counts the others.

    After the period each count becomes one line, before the next line of any kind or at the end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._period_end_s = clock() + PERIOD_S
        self._events: dict[tuple[str, int], _Event] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if self._clock() >= self._period_end_s:
            self._write_counts()
        event = self._events.setdefault((record.pathname, record.lineno), _Event(record))
        event.last = record
        event.count += 1
        if event.count <= event.most:
            super().emit(record)

    def close(self) -> None:
        self._write_counts()
        super().close()

    def _write_counts(self) -> None:
        for event in self._events.values():
            if event.count > event.most:
                super().emit(_summary(event.last, event.count - event.most))
        self._events.clear()
        self._period_end_s = self._clock() + PERIOD_S


def _summary(last: logging.LogRecord, left_out: int) -> logging.LogRecord:
    origin = {"name": last.name, "levelno": last.levelno, "levelname": last.levelname}
    fields = {"msg": "lines left out", "event": str(last.msg), "left_out": left_out}
    return logging.makeLogRecord(origin | fields)


def configure(level: str) -> None:
    """Log JSON lines of this level to stderr through a CountingHandler."""
    formatter = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "format": "%(asctime)s %(levelname)s %(name)s %(message)s",
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": formatter},
            "handlers": {"stderr": {"()": CountingHandler, "formatter": "json"}},
            "root": {"level": level, "handlers": ["stderr"]},
        }
    )
