"""The configuration of every daemon in containers: the launcher's, with the paths in there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compute_node.config import ROUTER_MAP_NAME
from deploy.containers.network import listening_inside
from deploy.plan.budget import MemoryPlan
from deploy.settings import ServeSettings
from deploy.stack.run_dir import RunDir
from deploy.stack.tables import compose
from expert_store.manifest.manifest import Manifest
from proto.quality import QUALITY_NAME
from scheduler.config import FORECASTER_NAME

# Where the compose files mount things.
RUN = RunDir(Path("/run/flashmoe"))
STORE_DIR = Path("/store")
SOURCE_DIR = Path("/source")
SEGMENT = Path("/segment/experts")
KEYS_NAME = "api_keys"  # in the run folder


def container_tables(
    settings: ServeSettings, manifest: Manifest, plan: MemoryPlan
) -> dict[str, dict[str, Any]]:
    """The launcher's tables with the paths of the containers; those win over flashmoe.toml.

    Raises ConfigInvalid.
    """
    inside = settings.model_copy(update={"source": None})
    tables = compose(RUN, inside, STORE_DIR, manifest, plan)
    for name, table in tables.items():
        table["address"] = RUN.address(name)
        for key in ("metrics_port", "metrics_port_file"):  # nobody can reach them in there
            table.pop(key, None)
    sessions = str(RUN.path / "sessions")
    tables["expert_store"] |= {
        "store_dir": str(STORE_DIR),
        "source_root": str(SOURCE_DIR),
        "segment_path": str(SEGMENT),
        "session_dir": sessions,
    }
    asks = "compute_node" if settings.role == "main" else settings.role
    tables[asks] |= {"store_address": RUN.address("expert_store"), "session_dir": sessions}
    if settings.role == "main":
        _point_main_node(tables, settings)
    else:
        tables[asks] |= listening_inside(settings)
    return tables


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
