"""Prompts of different domains, and how fast a main node answers them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from compute_node.client.node_client import NodeClient
from tests.stack import ROOT

PROMPTS = ROOT / "tests/bench/prompts"
TEMPERATURE = 0.9


@dataclass(frozen=True)
class Answer:
    """gaps_s: between one token and the next"""

    token_ids: list[int]
    gaps_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        return len(self.gaps_s) / sum(self.gaps_s)


def prompts(count: int) -> list[str]:
    """The first 100 characters of as many domains."""
    return [path.read_text()[:100] for path in sorted(PROMPTS.glob("*.txt"))[:count]]


def ask(
    client: NodeClient,
    prompt: str,
    max_tokens: int,
    seed: int,
    on_first: Callable[[], None] = lambda: None,
) -> Answer:
    """on_first: called when the first token came, and the prompt is computed"""
    came_s, tokens = [], []
    for piece in client.generate(
        prompt,
        max_tokens=max_tokens,
        temperature=TEMPERATURE,
        seed=seed,
        ignore_eos=True,
        timeout_s=600,
    ):
        came_s.append(time.monotonic())
        tokens.append(piece.token_id)
        if len(tokens) == 1:
            on_first()
    return Answer(tokens, [b - a for a, b in pairwise(came_s)])
