"""The configuration that every daemon of a stack is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compute_node.config import ComputeNodeConfig
from deploy.plan.budget import MemoryPlan
from deploy.settings import ServeSettings
from deploy.stack.run_dir import RunDir
from expert_store.config import ExpertStoreConfig
from expert_store.manifest.manifest import Manifest
from proto import errors
from scheduler.config import SchedulerConfig

_CONFIGS: dict[str, type[BaseModel]] = {
    "expert_store": ExpertStoreConfig,
    "compute_node": ComputeNodeConfig,
    "scheduler": SchedulerConfig,
}
_OVERRIDABLE = {
    "read_depth",
    "spare_slots",
    "prefill_chunk_tokens",
    "policy",
    "decayed_half_life_tokens",
    "redis_url",
    "snapshot_path",
    "metrics_port",
    "metrics_port_file",
}


def compose(
    run: RunDir, settings: ServeSettings, store_dir: Path, manifest: Manifest, plan: MemoryPlan
) -> dict[str, dict[str, Any]]:
    """The tables every daemon is started with; what flashmoe.toml says of a daemon wins."""
    spec = manifest.spec
    redis_url = settings.redis or run.redis_url
    read_depth = settings.read_depth
    tables: dict[str, dict[str, Any]] = {
        "expert_store": {
            "address": run.address("expert_store"),
            "store_dir": str(store_dir),
            "segment_path": str(run.segment),
            "session_dir": str(run.path / "sessions"),
            "num_slots": plan.slots + plan.spare_slots,
            "spare_slots": plan.spare_slots,
            "resident_list": str(run.path / "resident.json"),
            "read_depth": read_depth,
            "metrics_port": 0,
            "metrics_port_file": str(run.path / "expert_store.metrics"),
        },
        "compute_node": {
            "address": run.address("compute_node"),
            "store_address": run.address("expert_store"),
            "session_dir": str(run.path / "sessions"),
            "slots": plan.slots,
            "prefill_chunk_tokens": settings.chunk_tokens(manifest.sizing),
            "policy": settings.policy,
            "redis_url": redis_url,
            "metrics_port": 0,
            "metrics_port_file": str(run.path / "compute_node.metrics"),
        },
        "scheduler": {
            "address": run.address("scheduler"),
            "redis_url": redis_url,
            "fingerprint": spec.fingerprint,
            "moe_layers": list(spec.moe_layers),
            "num_experts": spec.num_experts,
            "policy": settings.policy,
            "decayed_half_life_tokens": settings.half_life_tokens,
            "snapshot_path": str(run.path / f"scheduler-{spec.fingerprint}.npz"),
            "metrics_port": 0,
            "metrics_port_file": str(run.path / "scheduler.metrics"),
        },
    }
    _check_overrides(settings, tables)
    if forecaster := settings.forecaster(store_dir):
        tables["scheduler"]["forecaster_path"] = str(forecaster.resolve())
    if settings.source:
        tables["expert_store"]["source_root"] = str(settings.source.resolve())
    for name, table in tables.items():
        table.update(getattr(settings, name))
        try:
            _CONFIGS[name].model_validate(table)
        except ValidationError as error:
            raise errors.ConfigInvalid.of(f"table [{name}]", error) from error
    return tables


def _check_overrides(settings: ServeSettings, tables: dict[str, dict[str, Any]]) -> None:
    """Raises ConfigInvalid naming a key that the launcher derives from the plan and the run
    directory.
    """
    for name, table in tables.items():
        derived = (table.keys() - _OVERRIDABLE) & getattr(settings, name).keys()
        if derived:
            raise errors.ConfigInvalid(
                f"table [{name}] sets {sorted(derived)[0]!r}, which the launcher derives: "
                "remove it, "
                "and use --experts-memory, --run-dir or --redis"
            )
