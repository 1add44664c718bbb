"""How long an answer waits between two tokens while the prompt of another client is computed."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

from tests.bench.clients.engines import Running, at_once, running
from tests.bench.peers.laboratory import read_prompts
from tests.bench.table import machine, percentile, show

PROMPT_TOKENS, LONG_PROMPT_TOKENS = 48, 1900
CALM_TOKENS = 32  # of the answer, before the prompt comes
MOST_TOKENS = 1800


def stall(chosen: argparse.Namespace) -> None:
    print(machine())
    rows = [
        row
        for engine in chosen.engines
        for share in chosen.shares
        for row in _rows(chosen, engine, share)
    ]
    show(
        f"An answer's gaps between tokens while a prompt of {LONG_PROMPT_TOKENS} tokens comes, s",
        ["engine", "share", "before p50", "p50", "p95", "most", "tokens", "prompt's TTFT"],
        rows,
    )


def _rows(chosen: argparse.Namespace, name: str, share: float | None) -> Iterator[list[str]]:
    texts = read_prompts(LONG_PROMPT_TOKENS)
    long_prompt = [token for text in texts[1:] for token in text.token_ids][:LONG_PROMPT_TOKENS]
    limit = "none" if share is None else f"{share:g} %"
    with running(chosen.python, name, share, 2) as one:
        for number in range(chosen.rounds):
            prompt = [(token + number) % 8000 for token in long_prompt]  # none is kept
            calm, during, ttft_s = _gaps(one, list(texts[0].token_ids[:PROMPT_TOKENS]), prompt)
            figures = [percentile(calm, 0.5), *(percentile(during, at) for at in (0.5, 0.95, 1.0))]
            shown = [f"{figure:.2f}" for figure in figures]
            yield [name, limit, *shown, str(len(during)), f"{ttft_s:.1f}"]
            print(name, limit, *shown, len(during), f"{ttft_s:.1f}", flush=True)


def _gaps(
    one: Running, prompt: list[int], long_prompt: list[int]
) -> tuple[list[float], list[float], float]:
    """Of the answer before the long prompt comes and until its first token, and when that was."""
    at_s, comes, came = list[float](), threading.Event(), threading.Event()
    span = [0.0, 0.0]

    def answer() -> None:
        for token in one.engine.generate(prompt, MOST_TOKENS, 1):
            at_s.append(token.at_s)
            if len(at_s) == CALM_TOKENS:
                comes.set()
            if came.is_set():
                return

    def ask() -> None:
        comes.wait()
        span[0] = time.monotonic()
        span[1] = next(iter(one.engine.generate(long_prompt, 1, 2))).at_s
        came.set()

    at_once([answer, ask])
    began_s, ended_s = span
    gaps = [(b - a, b) for a, b in pairwise(at_s)]
    calm = [gap for gap, at in gaps if at < began_s]
    during = [gap for gap, at in gaps if began_s <= at and at - gap <= ended_s]
    return calm, during, ended_s - began_s
