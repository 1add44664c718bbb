"""llama.cpp's server, over HTTP as its users have it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

from tests.bench.peers.engine import (
    THREADS,
    Setup,
    Start,
    Token,
    end_input,
    first_line,
    process,
)
from tests.bench.peers.models import GGUF
from tests.bench.peers.prompt_lines import TEMPERATURE


class LlamaCpp:
    """A running server."""

    def __init__(self, address: str) -> None:
        self._address = urlparse(address)

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        for reply in self._complete(
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

    def likeliest(self, prefix: Sequence[int]) -> int:
        """The token after `prefix`; what it shares with the last one is not computed again."""
        [reply] = self._complete(
            {
                "prompt": list(prefix),
                "n_predict": 1,
                "temperature": 0,
                "cache_prompt": True,
                "return_tokens": True,
                "stream": False,
            }
        )
        [token_id] = reply["tokens"]
        return int(token_id)

    def _complete(self, request: dict[str, object]) -> Iterator[dict[str, Any]]:
        """Replies as they come. Raises OSError when the server refuses, or ends."""
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
def llama_cpp(setup: Setup, threads: int = THREADS, slots: int = 1) -> Iterator[LlamaCpp]:
    """For the block. slots: sequences that it computes at once"""
    module = [str(setup.python), "-m", "tests.bench.peers.llama_server"]
    with process(setup, [*module, str(setup.folder / GGUF), str(threads), str(slots)]) as started:
        yield LlamaCpp(first_line(started, "http", setup.log))
        end_input(started)


def llama_cpp_slots(slots: int) -> Start:
    return lambda setup: llama_cpp(setup, slots=slots)


@contextmanager
def llama_cpp_one_thread(setup: Setup) -> Iterator[LlamaCpp]:
    with llama_cpp(setup, threads=1) as engine:
        yield engine
