"""Real stacks for system tests: `flashmoe serve` in a process of its own, and what it leaves
behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from compute_node.client.node_client import NodeClient
from deploy.report.status import collect_status
from deploy.stack.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "deploy/models/tiny-moe"
FLASHMOE = [sys.executable, "-m", "deploy.cli"]


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`. Fails the test after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
    return value


def flashmoe(
    *arguments: str, timeout_s: float = 120, umask: int = -1
) -> subprocess.CompletedProcess[str]:
    """umask: -1 is this process's"""
    return subprocess.run(
        [*FLASHMOE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        umask=umask,
    )


class ServedStack:
    """A running `flashmoe serve`."""

    def __init__(self, process: subprocess.Popen[str], run: RunDir) -> None:
        self.process = process
        self.run = run

    @property
    def launcher(self) -> psutil.Process:
        """The flashmoe process itself, also behind a wrapper."""
        process = psutil.Process(self.process.pid)
        return process.children()[0] if process.name() == "setsid" else process

    @property
    def address(self) -> str:
        return self.run.address("compute_node")

    @property
    def url(self) -> str:
        """Of its gateway, where it has one."""
        return f"http://{self.run.http.read_text().strip()}"

    def client(self) -> NodeClient:
        return NodeClient(self.address)

    def pid(self, name: str) -> int:
        """Of the daemon that runs now."""
        markers = {"valkey": "valkey-server", "gateway": "-m compute_node.gateway "}
        marker = markers.get(name, f"-m {name} ")
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if marker in " ".join(child.cmdline()) + " " and child.status() != "zombie":
                    return child.pid
        raise LookupError(name)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self, name: str) -> int:
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def generate(self, prompt: str = "In the beginning", **options: Any) -> list[int]:
        with self.client() as node:
            options = {"max_tokens": 32, "ignore_eos": True, "timeout_s": 60, **options}
            return node.generate(prompt, **options).run().token_ids

    def status(self) -> dict[str, Any]:
        """What `flashmoe status --json` prints, without a process of its own for each look."""
        return dict(json.loads(json.dumps(collect_status(self.run))))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def served(
    store_dir: Path,
    run_dir: Path,
    *arguments: str,
    command: list[str] | None = None,
    fresh: bool = True,
) -> Iterator[ServedStack]:
    """A stack that is ready, for the block; afterwards nothing of it may be left.

    fresh: without what an earlier one left in `run_dir`
    """
    run = RunDir(run_dir.resolve())
    if fresh:
        shutil.rmtree(run_dir, ignore_errors=True)
    if not any(a.startswith("--experts-memory") for a in arguments):
        arguments = (*arguments, "--experts-memory", "37.5%")
    flags = ["serve", "--model", str(store_dir), "--run-dir", str(run_dir), *arguments]
    process = subprocess.Popen(
        [*(command or FLASHMOE), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: "), f"{line!r} {process.stderr.read()}"
        stack = ServedStack(process, run)
        children = stack.children()
        yield stack
        if process.poll() is None:
            children = stack.children()
            assert stack.stop() == 0
        assert_nothing_left(run, children)
    finally:
        if process.poll() is None:
            stop_hard(process)
        process.stdout.close()
        process.stderr.close()


@contextmanager
def answering(stack: ServedStack, max_tokens: int) -> Iterator[None]:
    """An answer after the other, for the block."""
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            stack.generate(max_tokens=max_tokens)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def stop_hard(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def assert_nothing_left(run: RunDir, children: list[psutil.Process]) -> None:
    """No process, segment or lock file of the stack."""
    wait_for(lambda: not any(c.is_running() for c in children), 30, "the daemons to end")
    assert not run.segment.exists()
    sessions = run.path / "sessions"
    assert not sessions.exists() or list(sessions.iterdir()) == []
