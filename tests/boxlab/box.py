"""One box of the laboratory: a network namespace, a disk, control groups."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compute_node.client.node_client import NodeClient
from deploy.stack.run_dir import RunDir
from tests.boxlab.disk import Disk
from tests.boxlab.group import BoxGroup, Throttle
from tests.boxlab.switch import Link, Switch
from tests.stack import FLASHMOE, ROOT, ServedStack

PORT = 9400
_CLONE_NEWNET = 0x40000000
_STOP_S = 60.0
_HELPERS = ("worker", "shadow")


@dataclass(frozen=True)
class Box:
    """name: of its namespace; folder: for its files; host: its address"""

    name: str
    folder: Path
    host: str
    disk: Disk
    group: BoxGroup
    switch: Switch
    link: Link
    speed: Throttle

    @property
    def address(self) -> str:
        """Where its worker listens."""
        return f"{self.host}:{PORT}"

    @property
    def store_dir(self) -> Path:
        return self.disk.folder / "store"

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "run")

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, started on this box."""
        return self.group.command(["nsenter", f"--net=/run/netns/{self.name}", *command])

    def heal(self) -> None:
        """Link and disk as they were at first; no process stands still."""
        self.switch.set(self.name, self.link)
        self.group.throttle(self.speed)
        self.signal(signal.SIGCONT)

    def cut_off(self) -> None:
        """A partition: packets are lost, connections stay."""
        self.switch.set(self.name, self.link.down())

    def signal(self, number: int) -> None:
        """To all of its processes."""
        for pid in self.group.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def num_connections(self) -> int:
        """Of main nodes to its worker. Raises LookupError when nothing runs here."""
        for pid in self.group.pids:
            tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
            ends = [line.split()[1:4] for table in tables for line in table.splitlines()[1:]]
            return sum(own.endswith(f":{PORT:04X}") and st == "01" for own, _, st in ends)
        raise LookupError(self.name)

    @contextmanager
    def worker(self, *flags: str) -> Iterator[ServedStack]:
        """`flashmoe worker`, ready, for the block."""
        with self._verb("worker", "--listen", self.address, *flags) as started:
            yield started

    @property
    def at_store(self) -> str:
        """Where its store lends."""
        return f"{self.host}:{PORT + 100}"

    @contextmanager
    def borrower(self, lender: Box, *flags: str) -> Iterator[ServedStack]:
        """`flashmoe worker` with the experts of another box's store, ready, for the block."""
        borrowed = ("--store", lender.at_store)
        with self._verb("worker", "--listen", self.address, *borrowed, *flags) as started:
            yield started

    @contextmanager
    def shadow(self, *flags: str) -> Iterator[ServedStack]:
        """`flashmoe shadow`, ready, for the block."""
        with self._verb("shadow", "--listen", self.address, *flags) as started:
            yield started

    @contextmanager
    def main(self, workers: Sequence[Box], *flags: str, node: str = "") -> Iterator[ServedStack]:
        """`flashmoe serve` with these, ready, for the block. node: more of [compute_node]"""
        wanted = [word for box in workers for word in ("--worker", box.address)]
        with self._verb("serve", *wanted, *flags, node=node) as started:
            yield started

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes are this box's, for the block. Raises OSError."""
        with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{self.name}") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def client(self) -> NodeClient:
        """Of the main node, over its Unix socket."""
        return NodeClient(self.run.address("compute_node"))

    def _config(self, node: str) -> Path:
        """The laboratory is a network of its own; a box has one processor, as all share few."""
        path = self.folder / "flashmoe.toml"
        helpers = "".join(f"[{name}]\ninsecure = true\nthreads = 1\n" for name in _HELPERS)
        store = "[expert_store]\ninsecure = true\n"
        path.write_text(f"{helpers}{store}[compute_node]\nthreads = 1\n{node}")
        return path

    @contextmanager
    def _verb(self, verb: str, *flags: str, node: str = "") -> Iterator[ServedStack]:
        """Raises OSError when it does not start."""
        log = self.folder / f"{verb}.log"
        places = [] if "--store" in flags else ["--model", str(self.store_dir)]
        places += ["--run-dir", str(self.run.path)]
        places += ["--config", str(self._config(node))]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                self.command([*FLASHMOE, verb, *places, *flags]),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert process.stdout
        try:
            line = process.stdout.readline()
            if not line.startswith("ready: "):
                raise OSError(f"flashmoe {verb} did not start: {log.read_text()[-1000:]}")
            yield ServedStack(process, self.run)
            self.heal()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                if status := process.wait(_STOP_S):
                    raise OSError(f"flashmoe {verb} ended with {status}: {log.read_text()[-1000:]}")
        finally:
            self.signal(signal.SIGKILL)  # a launcher that was killed leaves its daemons
            process.wait()
            process.stdout.close()


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
