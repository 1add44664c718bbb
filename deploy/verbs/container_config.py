"""Renders what runs a store in containers, from the store and a memory plan: docker-compose.yml,
the compose.env that it reads, and the daemons' flashmoe.toml.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from compute_node.config import ROUTER_MAP_NAME
from deploy.containers import compose_project, network
from deploy.containers.container_user import ContainerUser
from deploy.containers.memory_limits import container_limits, plan_containers
from deploy.containers.tables import KEYS_NAME, RUN, SOURCE_DIR, container_tables
from deploy.plan.budget import MemoryPlan
from deploy.settings import Role, ServeSettings
from deploy.stack.run_dir import CONFIG_NAME, RunDir
from deploy.stack.stack_plan import StackPlan, load_store
from deploy.terminal import console, options
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from proto import errors
from proto.checkpoint import hub_cache
from scheduler.config import FORECASTER_NAME

OUT = typer.Option("--out", metavar="DIR", help="Folder to write; DIR/run will hold the sockets.")
NAME = typer.Option(help="Of the compose project, one a stack. (default: follows from DIR)")
STORE = typer.Argument(
    metavar="STORE", help="Of index or pack; none where --store names another's."
)
LENT_STORE = typer.Option(
    "--store", metavar="HOST:PORT", help="Of a worker: borrow experts where another box lends them."
)
ROLE = typer.Option(help="What this box does: serve, or help a main node on another.")
LISTEN = typer.Option(
    metavar="HOST:PORT",
    help="Of a worker or shadow: where main nodes reach it; TLS beyond loopback. (default: "
    "127.0.0.1:9400)",
)


def container_config(
    store: Annotated[Path | None, STORE] = None,
    *,
    out: Annotated[Path, OUT],
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    http: Annotated[str | None, options.HTTP] = None,
    api_key_file: Annotated[Path | None, options.API_KEY_FILE] = None,
    role: Annotated[Role, ROLE] = "main",
    listen: Annotated[str | None, LISTEN] = None,
    lent_store: Annotated[str | None, LENT_STORE] = None,
    lend: Annotated[str | None, options.LEND] = None,
    worker: Annotated[list[str] | None, options.WORKER] = None,
    shadow: Annotated[str | None, options.SHADOW] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
    name: Annotated[str | None, NAME] = None,
) -> None:
    """Write what docker compose needs to serve a store; prints the command to start it.

    The memory limits of the containers sum to no more than --memory. Run it again when the store
    was indexed again, or the plan changes; then the same command starts anew what changed.

    Example: flashmoe container-config ~/stores/olmoe --memory 4GiB --out ~/flashmoe
    """
    check_flags(
        role,
        {
            "main": {
                "--http": http,
                "--api-key-file": api_key_file,
                "--worker": worker,
                "--shadow": shadow,
                "--lend": lend,
            },
            "worker": {"--listen": listen, "--store": lent_store, "--lend": lend},
            "shadow": {"--listen": listen},
        },
    )
    settings = ServeSettings.load(config).borrowing(lent_store, store)
    settings = settings.with_flags(
        memory=memory,
        experts_memory=experts_memory,
        source=source,
        http=http,
        api_key_file=api_key_file,
        listen=listen,
        lend=lend,
        workers=tuple(worker) if worker else None,
        shadow_address=shadow,
    )
    settings = settings.model_copy(update={"redis": None})  # the compose file has its own Valkey
    if role != "main":
        settings = settings.of_helper(role)
    if settings.model is None and settings.borrows_from is None:
        raise errors.ConfigInvalid("give STORE or, of a worker, --store HOST:PORT")
    of_role, lent_port = variables_of_role(settings), network.lent(settings)
    plan, user, out = plan_containers(settings), ContainerUser.of_this_process(), out.resolve()
    tables = container_tables(settings, plan)
    of_store: dict[str, object] = {}
    manifest_text, segment_bytes = "", None
    if plan.store_dir is not None:
        manifest_text, segment_bytes, of_store = mount_store(plan, tables, user)
    limits = container_limits(settings, plan.memory, segment_bytes)
    files = network.certificates(tables, RUN.path)
    configuration = tomli_w.dumps(tables)
    environment = compose_project.render_environment(
        {
            "COMPOSE_PROJECT_NAME": compose_project.project_name(out, name),
            "FLASHMOE_UID": user.uid,
            "FLASHMOE_GID": user.gid,
            "FLASHMOE_CONFIG": out / CONFIG_NAME,
            "FLASHMOE_CONFIG_DIGEST": compose_project.digest(configuration, manifest_text),
            "FLASHMOE_RUN_DIR": out / compose_project.RUN_NAME,
            **of_store,
            **of_role,
            **({"FLASHMOE_LENT_PORT": lent_port} if lent_port is not None else {}),
            **{f"FLASHMOE_{part.upper()}_MEMORY": limit for part, limit in limits.items()},
        }
    )
    if settings.http is not None and settings.api_key_file is not None:
        files[KEYS_NAME] = settings.api_key_file
    prepare_run_dir(RunDir(out / compose_project.RUN_NAME), user)
    for inside, secret in files.items():
        user.give_copy(secret, out / compose_project.RUN_NAME / inside)
    (out / CONFIG_NAME).write_text(configuration)
    user.take(out / CONFIG_NAME)
    compose_project.write(out, environment, settings)
    used_bytes = sum(limits.values()) - (limits.get("gateway", 0) if settings.http is None else 0)
    say(plan.memory, used_bytes)
    profile = " --profile http" if settings.http is not None else ""
    console.out.print(f"{compose_project.command(out)}{profile} up --detach")


def mount_store(
    plan: StackPlan, tables: dict[str, dict[str, Any]], user: ContainerUser
) -> tuple[str, int, dict[str, object]]:
    """The text of the store's manifest, the bytes of its segment, and what the compose file reads
    of it; the store's table names its checkpoint as it is mounted.

    Raises ConfigInvalid for what is not there, and for what the containers' user cannot read.
    """
    assert plan.store_dir is not None
    store, manifest = plan.store_dir.resolve(), load_store(plan.store_dir)
    root = manifest.root(store, plan.settings.source)
    check_sources(manifest, root)
    check_readable(user, store, root, manifest)
    mounted = hub_cache.mounted(root)
    table = tables["expert_store"]
    table["source_root"] = str(SOURCE_DIR / root.relative_to(mounted))
    segment_bytes = manifest.size_classes.segment_layout(table["num_slots"]).segment_bytes
    manifest_text = (store / MANIFEST_NAME).read_text()
    return manifest_text, segment_bytes, {"FLASHMOE_STORE": store, "FLASHMOE_SOURCE": mounted}


def check_flags(role: Role, of_roles: Mapping[Role, Mapping[str, Any]]) -> None:
    """of_roles: each one's flags, as they were given. Raises ConfigInvalid for a flag that this
    role has no use for.
    """
    for other, flags in of_roles.items():
        for flag in (flag for flag, value in flags.items() if value):
            if flag not in of_roles[role]:
                raise errors.ConfigInvalid(
                    f"{flag} is not for --role {role}: leave it out, or give --role {other}"
                )


def variables_of_role(settings: ServeSettings) -> dict[str, str]:
    """What the role's compose file reads beside paths and limits. Raises ConfigInvalid."""
    if settings.borrows_from is not None:
        network.check_found(settings.borrows_from)
    if settings.role == "main":
        return {"FLASHMOE_NODE_NETWORK": network.node_network(settings)}
    return {"FLASHMOE_ROLE": settings.role, "FLASHMOE_PORTS": network.published(settings)}


def say(plan: MemoryPlan, used_bytes: int) -> None:
    console.err.print(
        f"{plan.slots} of {plan.num_experts} experts in memory; the containers may use "
        f"{console.size(used_bytes)} in all; `make image` builds what they run"
    )


def check_readable(user: ContainerUser, store: Path, root: Path, manifest: Manifest) -> None:
    """Raises ConfigInvalid naming a file that the containers need and their user cannot read."""
    beside = [path.name for path in root.iterdir() if path.is_file() and path.name[0] != "."]
    kept = (MANIFEST_NAME, FORECASTER_NAME, ROUTER_MAP_NAME)
    of_store = [n for n in kept if (store / n).exists()]
    user.check_can_read(store, of_store)
    user.check_can_read(root, [*(source.path for source in manifest.files), *beside])


def prepare_run_dir(run: RunDir, user: ContainerUser) -> None:
    """Make it the user's, and let daemons try again that had refused to start.

    Raises ConfigInvalid when sockets there cannot be.
    """
    run.prepare((os.geteuid(), user.uid))  # theirs since it was first prepared
    for file in run.path.glob(run.refusal("*").name):
        file.unlink(missing_ok=True)
    user.take(run.path)
