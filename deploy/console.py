"""How the command speaks: results on stdout, everything else on stderr, one sentence for an
error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from expert_store.progress import Report
from proto import errors

# Without markup: a path may have brackets in it.
out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

OK, DAMAGED, BAD_INPUT, NO_ROOM, UNAVAILABLE, DEFECT = 0, 1, 2, 3, 4, 70
EXIT_CODES = (
    "Exit codes: 0 done, 1 damage found or a check failed, 2 bad input or configuration, "
    "3 memory or queue does not suffice, 4 a daemon is away, stopping or too slow, 130 interrupted."
)


def exit_code(error: errors.FlashMoEError) -> int:
    """The code a script can act on."""
    if isinstance(error, errors.WeightsDamaged):
        return DAMAGED
    if isinstance(error, (errors.MemoryExceeded, errors.SlotsExhausted, errors.QueueFull)):
        return NO_ROOM
    waiting = (errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled, errors.StaleLease)
    if isinstance(error, waiting):
        return UNAVAILABLE
    return DEFECT if type(error) is errors.FlashMoEError else BAD_INPUT


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar with speed and time left on a terminal; silent elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def report(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield report


def table(title: str, rows: Mapping[str, str]) -> Table:
    """Two columns, no frame: reads well in a log too."""
    grid = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid


def write(text: str) -> None:
    """A model's text, as it is: no markup, no wrapping, tabs stay tabs."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def size(count: float) -> str:
    """`1.4 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
