"""The verbs that start, show and stop a cluster of boxes on Ray."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cluster.config import LOCAL, ClusterConfig
from deploy.cluster.extra import check_extra
from deploy.terminal import console, options
from proto import errors

FILE = typer.Argument(metavar="FILE", help="The cluster's boxes, as deploy/cluster/cluster.toml.")
BOX = typer.Option(
    "--box", metavar="NAME", help="Which box of FILE this machine is. (default: by its address)"
)
DOWN_BOX = typer.Option(
    "--box", metavar="NAME", help="End what runs for that box on this machine, where Ray is gone."
)

OUT = typer.Option("--out", metavar="DIR", help="Folder to write; made if need be.")

cluster = typer.Typer(
    help="Start a main node and its workers on several boxes, on Ray.\n\n"
    "Example: flashmoe cluster up cluster.toml",
    no_args_is_help=True,
    add_completion=False,
    epilog=console.EXIT_CODES,
)


def _load(file: Path) -> ClusterConfig:
    check_extra("ray")
    return ClusterConfig.load(file)


def _members(config: ClusterConfig) -> Any:
    """The module that speaks to Ray, which reads its environment when it is imported."""
    from deploy.cluster.here import here
    from deploy.cluster.ray_start import protected

    os.environ.update(protected(config, here(config).name))
    return importlib.import_module("deploy.cluster.members")


@cluster.command()
def up(file: Annotated[Path, FILE]) -> None:
    """Have every box run what FILE says. Again with a changed FILE: boxes join and leave.

    Example: flashmoe cluster up cluster.toml
    """
    config = _load(file)
    from deploy.cluster import local

    if config.ray == LOCAL:
        local.start(config, file, console.say)
    members = _members(config)
    with members.connected(config) as found:
        found.bring_up(console.say)
    run_dir = config.main.folder
    console.out.print(
        f"ready: {len(config.boxes)} boxes; on {config.main.name}: --run-dir {run_dir}"
    )


@cluster.command()
def status(file: Annotated[Path, FILE], as_json: Annotated[bool, options.JSON] = False) -> None:
    """How every box is: state, daemons, restarts, memory; exit 4 when one does not serve.

    Example: flashmoe cluster status cluster.toml
    """
    config = _load(file)
    members = _members(config)
    from deploy.cluster import report

    with members.connected(config) as found:
        boxes = report.collect(config, found)
    if as_json:
        console.print_json(boxes)
    else:
        pages = report.pages(boxes)
        console.out.print(*(console.table(name, rows) for name, rows in pages.items()), sep="\n\n")
    if any(facts["state"] != "serving" for facts in boxes.values()):
        raise typer.Exit(console.UNAVAILABLE)


@cluster.command()
def down(file: Annotated[Path, FILE], box: Annotated[str | None, DOWN_BOX] = None) -> None:
    """Stop all daemons on all boxes; exit 4 when one could not be reached.

    Example: flashmoe cluster down cluster.toml
    """
    config = _load(file)
    from deploy.cluster import local

    if box is not None:
        said = "stopped" if local.stop_box(config.box(box)) else "nothing ran"
        console.out.print(f"{box}: {said}")
        return
    members = _members(config)
    with members.connected(config) as found:
        names = [one.name for one in config.boxes]  # the main node first: it lets workers go
        names += [name for name in found.kept() if name not in names]
        reached = [found.take_down(name, console.say) for name in names]
    if config.ray == LOCAL:
        local.stop(config)
    if not all(reached):
        raise typer.Exit(console.UNAVAILABLE)
    console.out.print("stopped")


@cluster.command()
def certs(file: Annotated[Path, FILE], out: Annotated[Path, OUT]) -> None:
    """Write a private certificate authority, and a certificate and key for every box; again with
    the same folder: new certificates by the same authority, which running daemons take.

    Example: flashmoe cluster certs cluster.toml --out certs
    """
    check_extra("cryptography")
    config = ClusterConfig.load(file, is_protected=False)
    from deploy.cluster.certificates import CA_CERT, CA_KEY, Authority

    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = Authority.of(out)
    for box in config.boxes:
        authority.issue(out, box.name, [box.host])
        console.out.print(f"{box.name}: copy {CA_CERT}, {box.name}.pem and {box.name}.key to it")
    console.out.print(f"{out / CA_KEY} signs new ones: keep it, no box needs it")


@cluster.command()
def head(file: Annotated[Path, FILE]) -> None:
    """Run Ray's head here until interrupted; what it knows is kept on disk.

    Example: flashmoe cluster head cluster.toml
    """
    config = _load(file)
    from deploy.cluster import ray_start
    from deploy.cluster.head_state import HeadState

    box, port = config.head_box, config.head_port
    environment = ray_start.protected(config, box.name)
    folder = config.head.state_dir.expanduser()
    ray_start.claim(folder / ray_start.LOCK_NAME)
    state = HeadState(folder, config.head.state_port)
    state.start()
    ray_start.forget_dead_head(config.ray_address)
    ray_start.become(
        ray_start.head_command(box.host, port, state.password()),
        environment | {"RAY_REDIS_ADDRESS": state.address},
    )


@cluster.command()
def join(file: Annotated[Path, FILE], box: Annotated[str | None, BOX] = None) -> None:
    """Run Ray on this box until interrupted, so that `up` can use it.

    Example: flashmoe cluster join cluster.toml
    """
    config = _load(file)
    from deploy.cluster import ray_start
    from deploy.cluster.here import here

    own = config.box(box) if box else here(config)
    if config.head_box.host == own.host:
        raise errors.ConfigInvalid(
            f"box {own.name} is where Ray's head runs: `flashmoe cluster head {file}` does it all"
        )
    environment = ray_start.protected(config, own.name)
    ray_start.claim(own.folder.expanduser() / ray_start.LOCK_NAME)
    ray_start.become(ray_start.join_command(own.host, config.ray_address), environment)
