"""The configuration of every daemon in containers: the launcher's, with the paths in there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compute_node.config import ROUTER_MAP_NAME
from deploy.containers.network import lending_inside, listening_inside
from deploy.settings import ServeSettings
from deploy.stack.run_dir import RunDir
from deploy.stack.stack_plan import StackPlan
from deploy.stack.tables import compose
from proto.quality import QUALITY_NAME
from scheduler.config import FORECASTER_NAME

# Where the compose files mount things.
RUN = RunDir(Path("/run/flashmoe"))
STORE_DIR = Path("/store")
SOURCE_DIR = Path("/source")
SEGMENT = Path("/segment/experts")
KEYS_NAME = "api_keys"  # in the run folder


def container_tables(settings: ServeSettings, plan: StackPlan) -> dict[str, dict[str, Any]]:
    """The launcher's tables with the paths of the containers; those win over flashmoe.toml.

    Raises ConfigInvalid.
    """
    inside = settings.model_copy(update={"source": None})
    store_dir = STORE_DIR if plan.store_dir is not None else None
    tables = compose(RUN, inside, store_dir, plan.manifest, plan.memory)
    for name, table in tables.items():
        table["address"] = RUN.address(name)
        for key in ("metrics_port", "metrics_port_file"):  # nobody can reach them in there
            table.pop(key, None)
    if store_dir is not None:
        _point_store(tables, settings)
    if settings.role == "main":
        _point_main_node(tables, settings)
    else:
        tables[settings.role] |= listening_inside(settings)
    return tables


def _point_store(tables: dict[str, dict[str, Any]], settings: ServeSettings) -> None:
    """To what is mounted, and the daemon that computes to the store."""
    sessions = str(RUN.path / "sessions")
    tables["expert_store"] |= {
        "store_dir": str(STORE_DIR),
        "source_root": str(SOURCE_DIR),
        "segment_path": str(SEGMENT),
        "session_dir": sessions,
        **lending_inside(settings),
    }
    asks = "compute_node" if settings.role == "main" else settings.role
    tables[asks] |= {"store_address": RUN.address("expert_store"), "session_dir": sessions}


def _point_main_node(tables: dict[str, dict[str, Any]], settings: ServeSettings) -> None:
    """To Valkey, to keys of HTTP, and to what lies beside the store's manifest."""
    redis_url = f"unix://{RUN.socket('valkey')}"
    for name in ("compute_node", "scheduler"):
        tables[name]["redis_url"] = redis_url
    if settings.api_key_file is not None and "gateway" in tables:
        tables["gateway"]["api_key_file"] = str(RUN.path / KEYS_NAME)
    beside = {
        FORECASTER_NAME: ("forecaster_path", ("compute_node", "scheduler")),
        ROUTER_MAP_NAME: ("router_map_path", ("compute_node",)),
        QUALITY_NAME: ("quality_path", ("compute_node",)),
    }
    for file, (key, names) in beside.items():
        if settings.model is not None and (settings.model / file).exists():
            for name in names:
                tables[name][key] = str(STORE_DIR / file)
