"""The configuration that every daemon of a stack is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compute_node.config import ComputeNodeConfig
from compute_node.gateway.config import GatewayConfig
from compute_node.shadow.config import ShadowConfig
from compute_node.worker.config import WorkerConfig
from deploy.plan.budget import MemoryPlan
from deploy.plan.store_facts import StoreFacts
from deploy.settings import ServeSettings
from deploy.stack.run_dir import RunDir
from expert_store.config import ExpertStoreConfig
from proto import errors
from scheduler.config import SchedulerConfig

_CONFIGS: dict[str, type[BaseModel]] = {
    "expert_store": ExpertStoreConfig,
    "compute_node": ComputeNodeConfig,
    "scheduler": SchedulerConfig,
    "gateway": GatewayConfig,
    "worker": WorkerConfig,
    "shadow": ShadowConfig,
}
_OVERRIDABLE = {
    "read_depth",
    "spare_slots",
    "lent_slots",
    "prefill_chunk_tokens",
    "policy",
    "decayed_half_life_tokens",
    "importance",
    "redis_url",
    "snapshot_path",
    "verdicts_path",
    "metrics_port",
    "metrics_port_file",
    "model",
}


def compose(
    run: RunDir,
    settings: ServeSettings,
    store_dir: Path | None,
    manifest: StoreFacts,
    plan: MemoryPlan,
) -> dict[str, dict[str, Any]]:
    """The table of every daemon that runs. What flashmoe.toml sets for a daemon wins. store_dir:
    None: the store is another box's

    Raises ConfigInvalid for a setting that the launcher derives, or that the daemon refuses.
    """
    if store_dir is None:
        tables = {"worker": _borrowers_table(run, settings, manifest, plan)}
    else:
        tables = _with_store(run, settings, store_dir, manifest, plan)
    _check_overrides(settings, tables)
    if store_dir is not None:
        _name_files(tables, settings, store_dir)
    for name, table in tables.items():
        table.update(getattr(settings, name))
        if name == "compute_node":
            table["quality"] = settings.default_quality
        try:
            _CONFIGS[name].model_validate(table)
        except ValidationError as error:
            raise errors.ConfigInvalid.of(f"table [{name}]", error) from error
    return tables


def _with_store(
    run: RunDir, settings: ServeSettings, store_dir: Path, manifest: StoreFacts, plan: MemoryPlan
) -> dict[str, dict[str, Any]]:
    """What the launcher derives for the daemons of a box that has a store."""
    tables = {"expert_store": _store_table(run, settings, store_dir, plan)}
    if settings.role != "main":
        tables[settings.role] = _helper_table(run, settings, plan)
    else:
        tables["compute_node"] = _node_table(run, settings, manifest, plan)
        tables["scheduler"] = _scheduler_table(run, settings, manifest)
    if settings.http is not None:
        tables["gateway"] = _gateway_table(run, settings, store_dir)
    return tables


def _name_files(
    tables: dict[str, dict[str, Any]], settings: ServeSettings, store_dir: Path
) -> None:
    """Tell the daemons where files lie that settings may name too: a store's source, and what was
    calibrated and tuned for a main node, if anything was.
    """
    if settings.source:
        tables["expert_store"]["source_root"] = str(settings.source.resolve())
    if settings.role != "main":
        return
    if forecaster := settings.forecaster(store_dir):
        for name in ("compute_node", "scheduler"):
            tables[name]["forecaster_path"] = str(forecaster.resolve())
    if router_map := settings.router_map(store_dir):
        tables["compute_node"]["router_map_path"] = str(router_map.resolve())
    if quality_card := settings.quality_card(store_dir):
        tables["compute_node"]["quality_path"] = str(quality_card.resolve())


def _store_table(
    run: RunDir, settings: ServeSettings, store_dir: Path, plan: MemoryPlan
) -> dict[str, Any]:
    lending = {"listen": settings.lends_at, "lent_slots": plan.lent_slots}
    return _face(run, "expert_store") | {
        **(lending if plan.lent_slots else {}),
        "store_dir": str(store_dir),
        "segment_path": str(run.segment),
        "session_dir": str(run.path / "sessions"),
        "num_slots": plan.slots + plan.spare_slots + plan.lent_slots,
        "spare_slots": plan.spare_slots,
        "resident_list": str(run.path / "resident.json"),
        "read_depth": settings.read_depth,
    }


def _node_table(
    run: RunDir, settings: ServeSettings, manifest: StoreFacts, plan: MemoryPlan
) -> dict[str, Any]:
    table = _face(run, "compute_node") | {
        "store_address": run.address("expert_store"),
        "session_dir": str(run.path / "sessions"),
        "slots": plan.slots,
        "kv_bytes": plan.parts["kv_cache"],
        "kv_bytes_per_token": manifest.sizing.cache_bytes_per_token,
        "kv_bytes_fixed": manifest.sizing.cache_bytes_fixed,
        "verdicts_path": str(run.path / "kernels.json"),
        "prefill_chunk_tokens": settings.chunk_tokens(manifest.sizing),
        "policy": settings.policy,
        "redis_url": settings.redis or run.redis_url,
        "workers": list(settings.workers),
    }
    if settings.shadow_address is not None:
        table["shadow_address"] = settings.shadow_address
    return table


def _helper_table(run: RunDir, settings: ServeSettings, plan: MemoryPlan) -> dict[str, Any]:
    return _face(run, settings.role) | {
        "listen": settings.listen,
        "store_address": run.address("expert_store"),
        "session_dir": str(run.path / "sessions"),
        "slots": plan.slots,
        "verdicts_path": str(run.path / "kernels.json"),
    }


def _borrowers_table(
    run: RunDir, settings: ServeSettings, manifest: StoreFacts, plan: MemoryPlan
) -> dict[str, Any]:
    return _helper_table(run, settings, plan) | {
        "store_address": settings.borrows_from,
        "transport": "chunks",
        "fingerprint": manifest.spec.fingerprint,
    }


def _scheduler_table(run: RunDir, settings: ServeSettings, manifest: StoreFacts) -> dict[str, Any]:
    spec = manifest.spec
    return _face(run, "scheduler") | {
        "redis_url": settings.redis or run.redis_url,
        "fingerprint": spec.fingerprint,
        "moe_layers": list(spec.moe_layers),
        "num_experts": spec.num_experts,
        "policy": settings.policy,
        "decayed_half_life_tokens": settings.half_life_tokens,
        "importance": settings.runs_importance,
        "snapshot_path": str(run.path / f"scheduler-{spec.fingerprint}.npz"),
    }


def _gateway_table(run: RunDir, settings: ServeSettings, store_dir: Path) -> dict[str, Any]:
    table = _face(run, "gateway") | {
        "http": settings.http,
        "http_port_file": str(run.http),
        "node_address": run.address("compute_node"),
        "store_address": run.address("expert_store"),
        "scheduler_address": run.address("scheduler"),
        "run_dir": str(run.path),
        "model": store_dir.name,
        "cors_origins": list(settings.cors_origins),
    }
    if settings.api_key_file is not None:
        table["api_key_file"] = str(settings.api_key_file.resolve())
    return table


def _face(run: RunDir, name: str) -> dict[str, Any]:
    """Where a daemon can be reached: its socket, and its metrics page on any free port."""
    return {
        "address": run.address(name),
        "metrics_port": 0,
        "metrics_port_file": str(run.path / f"{name}.metrics"),
    }


def _check_overrides(settings: ServeSettings, tables: dict[str, dict[str, Any]]) -> None:
    """Raises ConfigInvalid naming a key that the launcher derives from the plan and the run
    directory.
    """
    for name, table in tables.items():
        derived = (table.keys() - _OVERRIDABLE) & getattr(settings, name).keys()
        if derived:
            raise errors.ConfigInvalid(
                f"table [{name}] sets {sorted(derived)[0]!r}, which the launcher derives: "
                "remove it, and use --experts-memory, --run-dir, --redis, --http or --lend"
            )
