"""The verb that shows the health and figures of a running stack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.report.status import collect_status
from deploy.report.status_page import status_rows
from deploy.settings import ServeSettings
from deploy.stack.connection import find_absence
from deploy.stack.run_dir import RunDir, RunState
from deploy.terminal import console, options


def status(
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    as_json: Annotated[bool, options.JSON] = False,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Health, hit ratio, residents and advice age of a running stack; exit 4 when a daemon is away.

    Example: flashmoe status --run-dir ~/.flashmoe/run
    """
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    run = RunDir(settings.run_dir.resolve())
    found = collect_status(run)
    if as_json:
        console.print_json(found)
    else:
        absences = {
            name: find_absence(run, name).value
            for name, facts in found.items()
            if facts.get("health") == "away"
        }
        if run.state() is RunState.ABSENT:
            found.pop("memory", None)  # the last words of a launcher that is gone
        tables = [console.table(*page) for page in status_rows(found, absences).items()]
        console.out.print(*tables, sep="\n\n")
    if any(facts["health"] != "SERVING" for facts in found.values() if "health" in facts):
        raise typer.Exit(console.UNAVAILABLE)
