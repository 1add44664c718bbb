"""The outer end of a worker: an engine in a process of its own, told prompts line by line."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from tests.bench.peers.engine import Setup, Token, end_input, first_line, process
from tests.bench.peers.prompt_lines import READY


class Worker:
    """A running one."""

    def __init__(self, started: subprocess.Popen[str]) -> None:
        self._started = started

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        assert self._started.stdin and self._started.stdout
        request = {"prompt": list(prompt), "max_tokens": max_tokens, "seed": seed}
        self._started.stdin.write(json.dumps(request) + "\n")
        self._started.stdin.flush()
        for line in islice(self._started.stdout, max_tokens):
            yield Token(int(line), time.monotonic())


@contextmanager
def working(setup: Setup, command: Sequence[str]) -> Iterator[Worker]:
    """A worker for the block. Raises OSError when it does not start."""
    with process(setup, command) as started:
        first_line(started, READY, setup.log)
        yield Worker(started)
        end_input(started)
