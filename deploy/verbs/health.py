"""The verb that asks one daemon whether it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.report.status import check_health
from deploy.terminal import console
from deploy.terminal.prompts import as_text


def health(
    address: Annotated[str, typer.Argument(help="unix:PATH or HOST:PORT of a daemon.")],
) -> None:
    """Ask one daemon whether it serves: exit 0 or 4. What container health checks call.

    Example: flashmoe health unix:/run/flashmoe/expert_store.sock
    """
    state = check_health(as_text(address, "the address"))
    console.out.print(state)
    if state != "SERVING":
        raise typer.Exit(console.UNAVAILABLE)
