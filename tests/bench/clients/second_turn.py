"""The second turn of a conversation against its first: time to the first token."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from compute_node.client.node_client import NodeClient
from expert_store.offline.index import index
from tests.bench.clients.engines import running
from tests.bench.peers.engine import Engine
from tests.bench.peers.laboratory import read_prompts
from tests.bench.table import machine, show, spread
from tests.stack import MODEL, ServedStack, served

FIRST_TOKENS, NEW_TOKENS = 1500, 32
END_OF_TURN = 0  # the shipped model's special token
SHIPPED = "shipped"

FirstToken = Callable[[list[int]], float]
"""Seconds until the first token of an answer to a prompt."""


def second_turn(chosen: argparse.Namespace) -> None:
    print(machine())
    rows = []
    with shipped() as stack, stack.client() as client:
        rows.append(_row(f"{SHIPPED}, resident", lambda prompt: _of_node(client, prompt), chosen))
    for engine in chosen.engines:
        for share in chosen.shares:
            with running(chosen.python, engine, share, 1) as one:
                ask = partial(_of_engine, one.engine)
                rows.append(_row(f"widened, {engine}, {share}", ask, chosen))
    show(
        f"Turn 2 ({NEW_TOKENS} new tokens after {FIRST_TOKENS}) over turn 1, time to first token",
        ["model", "turn 1, s", "turn 2, s", "ratio"],
        rows,
    )


@contextmanager
def shipped(*arguments: str) -> Iterator[ServedStack]:
    """The shipped model, fully resident."""
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        store, run = Path(folder) / "tiny-moe", Path(folder) / "run"
        index(MODEL, store)
        with served(store, run, "--experts-memory=100%", *arguments) as stack:
            yield stack


def _row(name: str, ask: FirstToken, chosen: argparse.Namespace) -> list[str]:
    turns = [_conversation(ask, number) for number in range(chosen.rounds + 1)][1:]  # not cold
    first, second = zip(*turns, strict=True)
    ratios = [two / one for one, two in turns]
    return [name, spread(first, 3), spread(second, 3), spread(ratios, 3)]


def _conversation(ask: FirstToken, number: int) -> tuple[float, float]:
    """Of two turns, that no other conversation begins like."""
    ids = [(i + number) % 8000 + 1 for t in read_prompts(FIRST_TOKENS) for i in t.token_ids]
    first = [*ids[: FIRST_TOKENS - 1], END_OF_TURN]
    second = [*first, *ids[FIRST_TOKENS : FIRST_TOKENS + NEW_TOKENS - 1], END_OF_TURN]
    return ask(first), ask(second)


def _of_engine(engine: Engine, prompt: list[int]) -> float:
    began_s = time.monotonic()
    return next(iter(engine.generate(prompt, 1, 1))).at_s - began_s


def _of_node(client: NodeClient, prompt: list[int]) -> float:
    began_s = time.monotonic()
    for _ in client.generate(prompt, max_tokens=1):
        break
    return time.monotonic() - began_s
