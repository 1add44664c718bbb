"""Renders what docker-compose.yml reads, from a store and a memory plan: the daemons' flashmoe.toml
and compose.env.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from deploy import console
from deploy.budget import MIB, OVERHEAD_BYTES, MemoryPlan
from deploy.local import compose
from deploy.offline import STORE
from deploy.online import CONFIG, EXPERTS_MEMORY, MEMORY, SOURCE
from deploy.run_dir import CONFIG_NAME, RunDir
from deploy.serve import prepare
from deploy.settings import ServeSettings, parse_bytes
from expert_store.manifest import Manifest, check_sources
from proto import errors, hub_cache
from proto.shm import SegmentLayout
from scheduler.config import FORECASTER_NAME

COMPOSE_FILE = Path(__file__).with_name("docker-compose.yml")
ENV_NAME = "compose.env"
OUT = typer.Option("--out", metavar="DIR", help="Folder to write; DIR/run will hold the sockets.")

# Where docker-compose.yml mounts things.
RUN = RunDir(Path("/run/flashmoe"))
STORE_DIR = Path("/store")
SOURCE_DIR = Path("/source")
SEGMENT = Path("/segment/experts")

# A container's limit holds its health check too, which is a process of its own.
STORE_ROOM_BYTES = 150 * MIB
ROOM_BYTES = {"compute_node": 64 * MIB, "scheduler": 64 * MIB, "valkey": 88 * MIB}
_NODE_PARTS = ("dense_weights", "kv_cache", "prefill_buffers", "compute_node")
_NOT_ROOT = 10001


def container_config(
    store: Annotated[Path, STORE],
    out: Annotated[Path, OUT],
    memory: Annotated[str | None, MEMORY] = None,
    experts_memory: Annotated[str | None, EXPERTS_MEMORY] = None,
    source: Annotated[Path | None, SOURCE] = None,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Write what deploy/docker-compose.yml reads to serve a store; prints the command to start it.

    The memory limits of the containers sum to no more than --memory. Run it again when the store
    was indexed again, or the plan changes.

    Example: flashmoe container-config ~/stores/olmoe --memory 4GiB --out ~/flashmoe
    """
    given = {"memory": memory, "experts_memory": experts_memory, "source": source}
    settings = ServeSettings.load(config).with_flags(model=store, **given)
    settings = settings.model_copy(update={"redis": None})  # the compose file has its own Valkey
    manifest, plan = plan_containers(settings)
    root = manifest.root(store, settings.source)
    check_sources(manifest, root)
    tables = container_tables(settings, manifest, plan)
    mounted = hub_cache.mounted(root)
    tables["expert_store"]["source_root"] = str(SOURCE_DIR / root.relative_to(mounted))
    segment_bytes = SegmentLayout(
        tables["expert_store"]["num_slots"], plan.slot_bytes
    ).segment_bytes
    limits = container_limits(plan, segment_bytes)
    out = out.resolve()
    owner = _prepare_run_dir(out / "run")
    (out / CONFIG_NAME).write_text(tomli_w.dumps(tables))
    variables = {
        "COMPOSE_PROJECT_NAME": "flashmoe",
        "FLASHMOE_UID": owner[0],
        "FLASHMOE_GID": owner[1],
        "FLASHMOE_CONFIG": out / CONFIG_NAME,
        "FLASHMOE_RUN_DIR": out / "run",
        "FLASHMOE_STORE": store.resolve(),
        "FLASHMOE_SOURCE": mounted,
        "FLASHMOE_SEGMENT_BYTES": segment_bytes,
        **{f"FLASHMOE_{name.upper()}_MEMORY": limit for name, limit in limits.items()},
    }
    text = "".join(f"{name}={value}\n" for name, value in variables.items())
    (out / ENV_NAME).write_text(text)
    console.err.print(
        f"{plan.slots} of {plan.num_experts} experts in memory; the containers may use "
        f"{console.size(sum(limits.values()))} in all. Start them with"
    )
    console.out.print(
        f"docker-compose --env-file {out / ENV_NAME} -f {COMPOSE_FILE} up --build --detach"
    )


def plan_containers(settings: ServeSettings) -> tuple[Manifest, MemoryPlan]:
    """The plan of the box, less what containers need beside it.

    Raises ConfigInvalid, ManifestInvalid, MemoryExceeded.
    """
    if settings.memory is None:
        _, manifest, plan = prepare(settings)
        return manifest, plan
    beside_bytes = (
        sum(ROOM_BYTES.values())
        + STORE_ROOM_BYTES
        - OVERHEAD_BYTES["expert_store"]
        - OVERHEAD_BYTES["launcher"]
    )
    ceiling_bytes = max(0, parse_bytes(settings.memory, "--memory") - beside_bytes)
    try:
        _, manifest, plan = prepare(settings.with_flags(memory=str(ceiling_bytes)))
    except errors.MemoryExceeded as error:
        raise errors.MemoryExceeded(
            f"{error} (--memory here is what is left of yours: containers need "
            f"{console.size(beside_bytes)} more, for health checks and Valkey's 64 MB in full)"
        ) from error
    return manifest, plan


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
    if settings.model is not None and (settings.model / FORECASTER_NAME).exists():
        tables["scheduler"]["forecaster_path"] = str(STORE_DIR / FORECASTER_NAME)
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
    }


def _prepare_run_dir(path: Path) -> tuple[int, int]:
    """Make it; returns user and group that the containers run as: us, or nobody's when we are
    root.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.getuid():
        return os.getuid(), os.getgid()
    os.chown(path, _NOT_ROOT, _NOT_ROOT)
    return _NOT_ROOT, _NOT_ROOT
