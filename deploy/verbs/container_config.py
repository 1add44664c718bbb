"""Renders what runs a store in containers, from the store and a memory plan: docker-compose.yml,
the compose.env that it reads, and the daemons' flashmoe.toml.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from compute_node.config import ROUTER_MAP_NAME
from deploy.containers import compose_project
from deploy.containers.container_user import ContainerUser
from deploy.plan.budget import MIB, OVERHEAD_BYTES, MemoryPlan
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.run_dir import CONFIG_NAME, RunDir
from deploy.stack.stack_plan import StackPlan
from deploy.stack.tables import compose
from deploy.terminal import console, options
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from proto import errors
from proto.checkpoint import hub_cache
from proto.quality import QUALITY_NAME
from scheduler.config import FORECASTER_NAME

OUT = typer.Option("--out", metavar="DIR", help="Folder to write; DIR/run will hold the sockets.")
NAME = typer.Option(help="Of the compose project, one a stack. (default: follows from DIR)")

# Where docker-compose.yml mounts things.
RUN = RunDir(Path("/run/flashmoe"))
STORE_DIR = Path("/store")
SOURCE_DIR = Path("/source")
SEGMENT = Path("/segment/experts")

# A container's limit holds its health check too, which is a process of its own.
STORE_ROOM_BYTES = 150 * MIB
ROOM_BYTES = {"compute_node": 64 * MIB, "scheduler": 64 * MIB, "valkey": 88 * MIB}
GATEWAY_ROOM_BYTES = 64 * MIB
KEYS_NAME = "api_keys"  # in the run folder
_NODE_PARTS = (
    "dense_weights",
    "kv_cache",
    "prefill_buffers",
    "tokenizer",
    "grammar",
    "compute_node",
)


def container_config(
    store: Annotated[Path, options.STORE],
    out: Annotated[Path, OUT],
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    http: Annotated[str | None, options.HTTP] = None,
    api_key_file: Annotated[Path | None, options.API_KEY_FILE] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
    name: Annotated[str | None, NAME] = None,
) -> None:
    """Write what docker compose needs to serve a store; prints the command to start it.

    The memory limits of the containers sum to no more than --memory. Run it again when the store
    was indexed again, or the plan changes; then the same command starts anew what changed.

    Example: flashmoe container-config ~/stores/olmoe --memory 4GiB --out ~/flashmoe
    """
    settings = ServeSettings.load(config).with_flags(
        model=store,
        memory=memory,
        experts_memory=experts_memory,
        source=source,
        http=http,
        api_key_file=api_key_file,
    )
    settings = settings.model_copy(update={"redis": None})  # the compose file has its own Valkey
    manifest, plan = plan_containers(settings)
    store, out = store.resolve(), out.resolve()
    root = manifest.root(store, settings.source)
    check_sources(manifest, root)
    user = ContainerUser.of_this_process()
    check_readable(user, store, root, manifest)
    tables = container_tables(settings, manifest, plan)
    mounted = hub_cache.mounted(root)
    tables["expert_store"]["source_root"] = str(SOURCE_DIR / root.relative_to(mounted))
    num_slots = tables["expert_store"]["num_slots"]
    limits = container_limits(plan, manifest.size_classes.segment_layout(num_slots).segment_bytes)
    configuration = tomli_w.dumps(tables)
    manifest_text = (store / MANIFEST_NAME).read_text()
    environment = compose_project.render_environment(
        {
            "COMPOSE_PROJECT_NAME": compose_project.project_name(out, name),
            "FLASHMOE_UID": user.uid,
            "FLASHMOE_GID": user.gid,
            "FLASHMOE_CONFIG": out / CONFIG_NAME,
            "FLASHMOE_CONFIG_DIGEST": compose_project.digest(configuration, manifest_text),
            "FLASHMOE_RUN_DIR": out / compose_project.RUN_NAME,
            "FLASHMOE_STORE": store,
            "FLASHMOE_SOURCE": mounted,
            **{f"FLASHMOE_{part.upper()}_MEMORY": limit for part, limit in limits.items()},
        }
    )
    prepare_run_dir(RunDir(out / compose_project.RUN_NAME), user)
    if settings.http is not None and settings.api_key_file is not None:
        copy_keys(settings.api_key_file, out / compose_project.RUN_NAME / KEYS_NAME, user)
    (out / CONFIG_NAME).write_text(configuration)
    user.take(out / CONFIG_NAME)
    compose_project.write(out, environment)
    used_bytes = sum(limits.values()) - (limits["gateway"] if settings.http is None else 0)
    console.err.print(
        f"{plan.slots} of {plan.num_experts} experts in memory; the containers may use "
        f"{console.size(used_bytes)} in all; `make image` builds what they run"
    )
    profile = " --profile http" if settings.http is not None else ""
    console.out.print(f"{compose_project.command(out)}{profile} up --detach")


def check_readable(user: ContainerUser, store: Path, root: Path, manifest: Manifest) -> None:
    """Raises ConfigInvalid naming a file that the containers need and their user cannot read."""
    beside = [path.name for path in root.iterdir() if path.is_file() and path.name[0] != "."]
    kept = (MANIFEST_NAME, FORECASTER_NAME, ROUTER_MAP_NAME)
    of_store = [n for n in kept if (store / n).exists()]
    user.check_can_read(store, of_store)
    user.check_can_read(root, [*(source.path for source in manifest.files), *beside])


def plan_containers(settings: ServeSettings) -> tuple[Manifest, MemoryPlan]:
    """The plan of the box, less what containers need beside it.

    Raises ConfigInvalid, ManifestInvalid, MemoryExceeded.
    """
    if settings.memory is None:
        plan = StackPlan.of(settings)
        return plan.manifest, plan.memory
    beside_bytes = (
        sum(ROOM_BYTES.values())
        + STORE_ROOM_BYTES
        - OVERHEAD_BYTES["expert_store"]
        - OVERHEAD_BYTES["launcher"]
        + (GATEWAY_ROOM_BYTES if settings.http is not None else 0)
    )
    ceiling_bytes = max(0, parse_bytes(settings.memory, "--memory") - beside_bytes)
    try:
        plan = StackPlan.of(settings.with_flags(memory=str(ceiling_bytes)))
    except errors.MemoryExceeded as error:
        raise errors.MemoryExceeded(
            f"{error} (--memory here is what is left of yours: containers need "
            f"{console.size(beside_bytes)} more, for health checks and Valkey's 64 MB in full)"
        ) from error
    return plan.manifest, plan.memory


def container_tables(
    settings: ServeSettings, manifest: Manifest, plan: MemoryPlan
) -> dict[str, dict[str, Any]]:
    """The launcher's tables with the paths of the containers; those win over flashmoe.toml."""
    inside = settings.model_copy(update={"source": None})
    tables = compose(RUN, inside, STORE_DIR, manifest, plan)
    for name, table in tables.items():
        table["address"] = RUN.address(name)
        for key in ("metrics_port", "metrics_port_file"):  # nobody can reach them in there
            table.pop(key, None)
    sessions, redis_url = str(RUN.path / "sessions"), f"unix://{RUN.socket('valkey')}"
    tables["expert_store"] |= {
        "store_dir": str(STORE_DIR),
        "source_root": str(SOURCE_DIR),
        "segment_path": str(SEGMENT),
        "session_dir": sessions,
    }
    tables["compute_node"] |= {
        "store_address": RUN.address("expert_store"),
        "session_dir": sessions,
        "redis_url": redis_url,
    }
    tables["scheduler"] |= {"redis_url": redis_url}
    if settings.api_key_file is not None and "gateway" in tables:
        tables["gateway"]["api_key_file"] = str(RUN.path / KEYS_NAME)
    if settings.model is not None and (settings.model / FORECASTER_NAME).exists():
        for name in ("compute_node", "scheduler"):
            tables[name]["forecaster_path"] = str(STORE_DIR / FORECASTER_NAME)
    if settings.model is not None and (settings.model / ROUTER_MAP_NAME).exists():
        tables["compute_node"]["router_map_path"] = str(STORE_DIR / ROUTER_MAP_NAME)
    if settings.model is not None and (settings.model / QUALITY_NAME).exists():
        tables["compute_node"]["quality_path"] = str(STORE_DIR / QUALITY_NAME)
    return tables


def container_limits(plan: MemoryPlan, segment_bytes: int) -> dict[str, int]:
    """Memory limit in bytes by container. The segment is charged to the store: it touches it
    first.
    """
    parts = plan.parts
    return {
        "valkey": parts["valkey"] + ROOM_BYTES["valkey"],
        "expert_store": segment_bytes + STORE_ROOM_BYTES,
        "compute_node": sum(parts[name] for name in _NODE_PARTS) + ROOM_BYTES["compute_node"],
        "scheduler": parts["scheduler"] + ROOM_BYTES["scheduler"],
        "gateway": OVERHEAD_BYTES["gateway"] + GATEWAY_ROOM_BYTES,
    }


def copy_keys(source: Path, target: Path, user: ContainerUser) -> None:
    """Where the gateway's container finds them; its user alone can read them.

    Raises ConfigInvalid.
    """
    try:
        keys = source.read_bytes()
    except OSError as error:
        raise errors.ConfigInvalid(f"--api-key-file {source}: {error.strerror}") from error
    target.touch(mode=0o600)
    target.write_bytes(keys)
    user.take(target)


def prepare_run_dir(run: RunDir, user: ContainerUser) -> None:
    """Make it the user's, and let daemons try again that had refused to start.

    Raises ConfigInvalid when sockets there cannot be.
    """
    run.prepare((os.geteuid(), user.uid))  # theirs since it was first prepared
    for file in run.path.glob(run.refusal("*").name):
        file.unlink(missing_ok=True)
    user.take(run.path)
