"""FlashMoE as its users have it: a whole stack of `flashmoe serve`, and a client of its node."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from compute_node.client.node_client import NodeClient
from deploy.stack.run_dir import RunDir
from tests.bench.peers.engine import (
    STOP_S,
    THREADS,
    Setup,
    Token,
    first_line,
    process,
)
from tests.bench.peers.models import LOSSLESS, STORE, VARIANTS
from tests.bench.peers.prompt_lines import TEMPERATURE
from tests.bench.peers.worker import Worker, working

WITHIN_1_PERCENT = "precision 1"


class FlashMoE:
    """A running node. route: of every request, its prompt included"""

    def __init__(self, client: NodeClient, route: str = "") -> None:
        self._client = client
        self._route = route

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        generation = self._client.generate(
            list(prompt),
            max_tokens=max_tokens,
            temperature=TEMPERATURE,
            seed=seed,
            ignore_eos=True,
            route=self._route,
            route_prompts=True,
            client=str(seed),  # who asks at once asks with different seeds
        )
        for piece in generation:
            yield Token(piece.token_id, time.monotonic())


@contextmanager
def flashmoe(setup: Setup, store: str = STORE, route: str = "") -> Iterator[FlashMoE]:
    """The cgroup's limit is its ceiling; without one, every expert is resident."""
    run = RunDir(setup.log.parent / "run")
    limit = setup.limit_bytes
    memory = ["--experts-memory", "100%"] if limit is None else ["--memory", str(limit)]
    arguments = ["--model", str(setup.folder / store), "--run-dir", str(run.path), *memory]
    with process(setup, [sys.executable, "-m", "deploy.cli", "serve", *arguments]) as started:
        first_line(started, "ready: ", setup.log)
        with NodeClient(run.address("compute_node")) as client:
            yield FlashMoE(client, route)
        started.send_signal(signal.SIGTERM)
        started.wait(STOP_S)


@contextmanager
def flashmoe_lossless(setup: Setup) -> Iterator[FlashMoE]:
    """On the store packed lossless: the same bits in three quarters of the bytes."""
    with flashmoe(setup, LOSSLESS) as engine:
        yield engine


@contextmanager
def flashmoe_within_1_percent(setup: Setup) -> Iterator[FlashMoE]:
    """On the store with small records, by the fastest route that `flashmoe tune --quality 1%` finds
    for the model: it is the shipped one, whatever the width of its experts.
    """
    with flashmoe(setup, VARIANTS, WITHIN_1_PERCENT) as engine:
        yield engine


@contextmanager
def flashmoe_mapped(setup: Setup) -> Iterator[Worker]:
    """Its model code alone, on mapped files and madvise(WILLNEED)."""
    with working(setup, _mapped(setup, "sample")) as worker:
        yield worker


@contextmanager
def teacher_forced(setup: Setup) -> Iterator[Worker]:
    """The same, told a text as prompt: gives the likeliest token after each of its tokens."""
    with working(setup, _mapped(setup, "force")) as worker:
        yield worker


def _mapped(setup: Setup, way: str) -> list[str]:
    module = [sys.executable, "-m", "tests.bench.peers.mapped_worker"]
    return [*module, str(setup.folder / STORE), str(THREADS), way]
