"""The engines compared: each started whole inside a memory cgroup, each given token ids."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from compute_node.client import NodeClient
from deploy.run_dir import RunDir
from tests.bench.peers.cgroup import MemoryGroup
from tests.stack import ROOT

TEMPERATURE = 0.9
_STOP_S = 60.0


@dataclass(frozen=True)
class Token:
    """at_s: when it came, on time.monotonic."""

    token_id: int
    at_s: float


class Engine(Protocol):
    """One running engine."""

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        """Sampled at TEMPERATURE from the whole vocabulary, past any end of text."""
        ...


@dataclass(frozen=True)
class Setup:
    """What an engine is started with.

    python:      the peers' own environment
    folder:      where the model is, in every engine's format
    limit_bytes: of the cgroup; None: unlimited
    """

    python: Path
    folder: Path
    group: MemoryGroup
    limit_bytes: int | None
    log: Path


Start = Callable[[Setup], AbstractContextManager[Engine]]


class LlamaCpp:
    """llama.cpp's server, over HTTP as its users have it."""

    def __init__(self, address: str) -> None:
        self._address = urlparse(address)

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        for reply in self.complete(
            {
                "prompt": list(prompt),
                "n_predict": max_tokens,
                "seed": seed,
                "temperature": TEMPERATURE,
                "samplers": ["temperature"],
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
                "stream": True,
            }
        ):
            for token_id in reply["tokens"]:
                yield Token(token_id, time.monotonic())

    def complete(self, request: dict[str, object]) -> Iterator[dict[str, list[int]]]:
        """Replies as they come. Raises OSError when the server ended."""
        assert self._address.hostname
        connection = http.client.HTTPConnection(self._address.hostname, self._address.port)
        try:
            body, headers = json.dumps(request), {"Content-Type": "application/json"}
            connection.request("POST", "/completion", body, headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise OSError(f"llama.cpp answered {response.status}: {response.read()!r}")
            while line := response.readline():
                if line.strip():
                    yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()


@contextmanager
def llama_cpp(setup: Setup, threads: int = 2) -> Iterator[LlamaCpp]:
    """For the block."""
    module = [str(setup.python), "-m", "tests.bench.peers.llama_server"]
    command = [*module, str(setup.folder / "model.gguf"), str(threads)]
    with _process(setup, command) as process:
        yield LlamaCpp(_first_line(process, "http", setup.log))
        assert process.stdin
        process.stdin.close()
        process.wait(_STOP_S)


class FlashMoE:
    """A node of a whole stack, over gRPC."""

    def __init__(self, client: NodeClient) -> None:
        self._client = client

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        generation = self._client.generate(
            list(prompt),
            max_tokens=max_tokens,
            temperature=TEMPERATURE,
            seed=seed,
            ignore_eos=True,
        )
        for piece in generation:
            yield Token(piece.token_id, time.monotonic())


@contextmanager
def flashmoe(setup: Setup) -> Iterator[FlashMoE]:
    """`flashmoe serve` under the cgroup's limit; without one, every expert is resident."""
    run = RunDir(setup.log.parent / "run")
    limit = setup.limit_bytes
    memory = ["--experts-memory", "100%"] if limit is None else ["--memory", str(limit)]
    arguments = ["--model", str(setup.folder / "store"), "--run-dir", str(run.path), *memory]
    command = [sys.executable, "-m", "deploy.cli", "serve", *arguments]
    with _process(setup, command) as process:
        _first_line(process, "ready: ", setup.log)
        with NodeClient(run.address("compute_node")) as client:
            yield FlashMoE(client)
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_S)


ENGINES: dict[str, Start] = {"llama.cpp": llama_cpp, "FlashMoE": flashmoe}


@contextmanager
def _process(setup: Setup, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """In the cgroup and a session of its own; nothing of it is left after the block."""
    with setup.log.open("w") as log:
        process = subprocess.Popen(
            setup.group.command(command),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()


def _first_line(process: subprocess.Popen[str], start: str, log: Path) -> str:
    """The first line of output that begins so. Raises OSError when the process ends before."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith(start):
            return line.strip()
    raise OSError(f"it did not start: {log.read_text().strip()[-500:]}")
