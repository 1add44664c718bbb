"""Single daemons as real processes, for tests that need other constellations than one stack."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import tomli_w

from deploy.report.status import check_health
from proto import rpc
from proto import stats_pb2 as pb
from proto.expert_store_pb2_grpc import ExpertStoreStub
from proto.stats import Stats
from tests.stack import ROOT, wait_for


class DaemonProcess:
    """A daemon, its configuration and its log."""

    def __init__(
        self, name: str, run_dir: Path, table: dict[str, Any], label: str = "", module: str = ""
    ) -> None:
        """module: what is run; empty: the one of that name"""
        self.name = name
        self.address: str = table["address"]
        self.log = run_dir / f"{label or name}.log"
        config = run_dir / f"{label or name}.toml"
        config.write_text(tomli_w.dumps({name: table}))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module or name, "--config", str(config)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        def serving() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return check_health(self.address) == "SERVING"

        wait_for(serving, 60, f"{self.name} to serve")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def daemon(
    name: str, run_dir: Path, table: dict[str, Any], label: str = "", module: str = ""
) -> Iterator[DaemonProcess]:
    """A serving daemon for the block."""
    started = DaemonProcess(name, run_dir, table, label, module)
    try:
        started.wait_ready()
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.kill(started.process.pid, signal.SIGCONT)
        started.stop()


def store_table(store_dir: Path, run_dir: Path, num_slots: int, **more: Any) -> dict[str, Any]:
    return {
        "address": f"unix:{run_dir}/store.sock",
        "store_dir": str(store_dir),
        "segment_path": f"/dev/shm/flashmoe-test-{run_dir.name}",
        "session_dir": str(run_dir / "sessions"),
        "num_slots": num_slots,
        **more,
    }


def node_table(run_dir: Path, node: str, slots: int, **more: Any) -> dict[str, Any]:
    return {
        "address": f"unix:{run_dir}/{node}.sock",
        "node": node,
        "store_address": f"unix:{run_dir}/store.sock",
        "session_dir": str(run_dir / "sessions"),
        "slots": slots,
        **more,
    }


def store_stats(address: str) -> Stats:
    with rpc.connect(address) as channel:
        return Stats.from_pb(ExpertStoreStub(channel).Stats(pb.StatsRequest(), timeout=5))


def is_store_idle(address: str) -> bool:
    """Nothing filling, nothing leased, nobody waited for."""
    try:
        stats = store_stats(address)
    except grpc.RpcError:
        return False
    return not (
        stats.slots_filling or stats.slots_leased or stats.sessions or stats.orphaned_sessions
    )


class CuttableProxy:
    """A Unix socket in front of another, whose connections a test can cut.

    accepting: at once, else callers wait until `accept`
    """

    def __init__(self, listen: Path, target: Path, accepting: bool = True) -> None:
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        self._open: list[socket.socket] = []
        if accepting:
            self.accept()

    def accept(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection now, both ways."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._target))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
