"""The verb that shows a running stack live in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from compute_node.live.figures import Figures
from compute_node.live.look import NODE, SCHEDULER, STORE, Asker
from compute_node.live.reading import Looks
from deploy.report.top_page import frame
from deploy.settings import ServeSettings
from deploy.stack.connection import Absence, explain_absence, find_absence
from deploy.stack.run_dir import RunDir
from deploy.terminal import options
from deploy.terminal.signals import stop_flag
from proto import errors

ONCE = typer.Option("--once", help="Print one frame, after a second's look, and leave.")

_INTERVAL_S, _POLL_S = 1.0, 0.1
Show = Callable[[Figures], None]


def top(
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    once: Annotated[bool, ONCE] = False,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Speed, clients, hit ratio, policies, disk, memory and every expert, anew each second. Ctrl-C
    leaves.

    Example: flashmoe top --run-dir ~/.flashmoe/run
    """
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    run = RunDir(settings.run_dir.resolve())
    absence = find_absence(run, NODE)
    if absence is not Absence.SILENT:
        raise errors.Unavailable(explain_absence(run, absence))
    terminal = Console(highlight=False)
    if not (once or terminal.is_terminal):
        raise errors.InvalidRequest("top draws on a terminal: give --once to print one frame")
    stopped = stop_flag()
    if once:
        asyncio.run(_watch(run, lambda figures: _print(terminal, figures), stopped, num_looks=2))
        return
    with _drawing(terminal) as draw:
        asyncio.run(_watch(run, draw, stopped))


async def _watch(
    run: RunDir, show: Show, stopped: Callable[[], bool], num_looks: int | None = None
) -> None:
    """Look each second and show, until it is stopped; or only what the last of `num_looks` saw."""
    looks, number = Looks(), 0
    async with Asker(
        {name: run.address(name) for name in (NODE, STORE, SCHEDULER)}, run.path
    ) as asker:
        while not stopped() and number != num_looks:
            looks.add(await asker.look())
            number += 1
            if num_looks in (None, number):
                show(looks.figures())
            await _pause(stopped, 0 if number == num_looks else _INTERVAL_S)


async def _pause(stopped: Callable[[], bool], pause_s: float) -> None:
    for _ in range(round(pause_s / _POLL_S)):
        if not stopped():
            await asyncio.sleep(_POLL_S)


@contextmanager
def _drawing(terminal: Console) -> Iterator[Show]:
    """Draws on the whole terminal for the block, which has its old content again afterwards."""
    with Live(console=terminal, screen=True, auto_refresh=False) as live:
        yield lambda figures: live.update(frame(figures, terminal, terminal.height), refresh=True)


def _print(terminal: Console, figures: Figures) -> None:
    """All of the heat map, however long."""
    terminal.print(frame(figures, terminal, 10_000))
