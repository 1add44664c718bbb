"""How Ray is started on a box: `ray start`, with nothing beside what a cluster here needs."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from deploy.cluster.config import ClusterConfig
from deploy.stack import locks
from proto import errors

_OBJECT_STORE_BYTES = 80_000_000  # Ray's least: nothing of ours goes through it
_PATIENT = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(24 * 3600),  # a box waits for its head
    "RAY_agent_register_timeout_ms": "120000",  # small boxes start slowly
    "RAY_health_check_failure_threshold": "10",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no actor of ours takes work from others
}

LOCK_NAME = "ray.lock"


def protected(config: ClusterConfig, box: str) -> dict[str, str]:
    """Environment of every process that speaks to Ray on that box. Certificates encrypt and
    authenticate both sides; who has none gets nothing.
    """
    found = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    if config.certs is None:
        return found
    folder = config.certs.expanduser()
    files = {"SERVER_CERT": f"{box}.pem", "SERVER_KEY": f"{box}.key", "CA_CERT": "ca.pem"}
    for name in files.values():
        if not (folder / name).is_file():
            raise errors.ConfigInvalid(
                f"{folder / name} is missing: `flashmoe cluster certs` writes it, copy it here"
            )
    tls = {f"RAY_TLS_{role}": str(folder / name) for role, name in files.items()}
    return found | {"RAY_USE_TLS": "1"} | tls


def head_command(host: str, port: int, password: str) -> list[str]:
    """Ray's head, without dashboard and autoscaler. Its client server, which nobody here asks,
    cannot be left out where gRPC is installed, and gets the port after the next.
    """
    return _command(
        "--head",
        f"--node-ip-address={host}",
        f"--port={port}",
        f"--redis-password={password}",
        "--include-dashboard=false",
        "--no-monitor",
        f"--ray-client-server-port={port + 2}",
    )


def join_command(host: str, head: str) -> list[str]:
    """Ray on a box that joins the head at HOST:PORT."""
    return _command(f"--address={head}", f"--node-ip-address={host}")


def _command(*words: str) -> list[str]:
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    memory = f"--object-store-memory={_OBJECT_STORE_BYTES}"
    quiet = ("--disable-usage-stats", "--include-log-monitor=false")
    return [*start, *words, "--num-cpus=0", memory, *quiet]


def claim(lock: Path) -> None:
    """Hold the lock while this process lives, whatever it becomes.

    Raises AlreadyRunning, OSError.
    """
    lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = locks.hold(lock, locks.LOOK_S)
    if descriptor is None:
        raise errors.AlreadyRunning(f"Ray runs here for this box already: {lock} is held")
    fcntl.fcntl(descriptor, fcntl.F_SETFD, 0)


def become(words: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Turn this process into `ray start`. Raises OSError."""
    os.execvpe(words[0], words, {**os.environ, **_PATIENT, **environment})


def forget_dead_head(address: str) -> None:
    """Remove Ray's note that a head runs at this address, where we know that none does: beside
    raylets that wait for it on the same machine, Ray would not start it again. Raises OSError.
    """
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if note.is_file() and note.read_text().strip() == address:
        note.unlink()
