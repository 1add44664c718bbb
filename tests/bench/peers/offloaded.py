"""transformers with experts on disk, two ways: mapped in place, and accelerate's disk_offload."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from tests.bench.peers.engine import THREADS, Setup, Token, end_input, first_line, process
from tests.bench.peers.models import FUSED, OFFLOADED
from tests.bench.widen import MIB

_ROOM_BYTES = 1024 * MIB  # Python, torch, and what of a layer is in use


class Offloaded:
    """A running worker: a JSON line a prompt, a line a token."""

    def __init__(self, worker: subprocess.Popen[str]) -> None:
        self._worker = worker

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        assert self._worker.stdin and self._worker.stdout
        request = {"prompt": list(prompt), "max_tokens": max_tokens, "seed": seed}
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        for line in islice(self._worker.stdout, max_tokens):
            yield Token(int(line), time.monotonic())


@contextmanager
def transformers(setup: Setup) -> Iterator[Offloaded]:
    """device_map="auto": layers that fit beside the process stay in memory, the others' files are
    mapped. Without a limit, plain transformers.
    """
    where = "memory"
    if setup.limit_bytes is not None:
        where = str(max(0, setup.limit_bytes - _ROOM_BYTES) // MIB)
    with _worker(setup, where) as engine:
        yield engine


@contextmanager
def accelerate(setup: Setup) -> Iterator[Offloaded]:
    """disk_offload: a layer's weights are copied from disk each time that it is computed."""
    with _worker(setup, str(setup.folder / OFFLOADED)) as engine:
        yield engine


@contextmanager
def _worker(setup: Setup, where: str) -> Iterator[Offloaded]:
    module = [str(setup.python), "-m", "tests.bench.peers.offload_worker"]
    with process(setup, [*module, str(setup.folder / FUSED), where, str(THREADS)]) as started:
        first_line(started, "ready", setup.log)
        yield Offloaded(started)
        end_input(started)
