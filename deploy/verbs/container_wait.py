"""The container-wait verb: whether containers that were started do serve, or why not."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import redis
import typer

from deploy.containers.compose_project import RUN_NAME
from deploy.report.status import check_health
from deploy.stack.run_dir import CONFIG_NAME, RunDir
from deploy.terminal import console
from deploy.terminal.options import seconds
from proto import errors
from proto.process import daemon

DIR = typer.Argument(metavar="DIR", help="What --out of container-config was.")
TIMEOUT = typer.Option(
    callback=seconds, help="Seconds; the dense weights of a large model take minutes."
)
_DAEMONS = ("expert_store", "compute_node", "scheduler", "worker", "shadow", "gateway")
_POLL_S = 0.25


def container_wait(out: Annotated[Path, DIR], timeout: Annotated[float, TIMEOUT] = 600.0) -> None:
    """Wait until containers that were started serve; prints the command to reach them.

    Exit 2 or 3 with its sentence when a daemon refuses to start, 4 when one does not serve in time.

    Example: flashmoe container-wait ~/flashmoe
    """
    run = RunDir(out.resolve() / RUN_NAME)
    daemons = _daemons(out)
    is_helper = "compute_node" not in daemons
    waiting, deadline_s = [*([] if is_helper else ["valkey"]), *daemons], time.monotonic() + timeout
    while waiting:
        _check_refusals(run, daemons)
        for name in [name for name in waiting if _serves(run, name)]:
            console.err.print(f"{name} serves")
            waiting.remove(name)
        if waiting and time.monotonic() > deadline_s:
            raise errors.Unavailable(
                f"{' and '.join(waiting)} did not serve within {timeout:g} s: see the containers' "
                "logs"
            )
        time.sleep(_POLL_S if waiting else 0)
    verb = "status" if is_helper else 'generate "Once upon a time"'
    console.out.print(f"{_program()} {verb} --run-dir {shlex.quote(str(run.path))}")


def _program() -> str:
    """This command, as a shell here finds it."""
    own = Path(sys.argv[0])
    found = own.name != "flashmoe" or shutil.which("flashmoe") == str(own)
    return "flashmoe" if found else shlex.quote(str(own))


def _daemons(out: Path) -> list[str]:
    """Those that were configured. Raises ConfigInvalid."""
    try:
        tables = tomllib.loads((out / CONFIG_NAME).read_text())
    except FileNotFoundError:
        raise errors.ConfigInvalid(
            f"{out} has no {CONFIG_NAME}: give the folder that container-config wrote to"
        ) from None
    return [name for name in _DAEMONS if name in tables]


def _check_refusals(run: RunDir, daemons: Sequence[str]) -> None:
    """Raises what a daemon says that refuses to start."""
    for name in daemons:
        try:
            sentence = run.refusal(name).read_text().strip()
        except FileNotFoundError:
            continue
        error = daemon.refusal(sentence)
        raise type(error)(f"{name} refuses to start: {error}")


def _serves(run: RunDir, name: str) -> bool:
    if not run.socket(name).exists():
        return False
    if name != "valkey":
        return check_health(run.address(name)) == "SERVING"
    with redis.Redis(unix_socket_path=str(run.socket(name)), socket_timeout=3.0) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
