"""How soon a stack that starts again hits as before: with the list of residents, and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compute_node.client.node_client import NodeClient
from expert_store.offline.index import index
from tests.bench.table import show, spread
from tests.bench.widen import MIB, widen
from tests.stack import MODEL, ROOT, served

RECORD_BYTES, SHARE = 3 * MIB, "37.5%"
PROMPTS = ("bible", "pystdlib", "manpages", "gcide", "perldoc", "handbook")
CHARACTERS, TOKENS, ROUNDS = 240, 32, 3
OLD = 0.98  # so much of the old hit ratio counts as the old one


@dataclass(frozen=True)
class Asked:
    """One prompt. hit_ratio: of prompt and decode together; ended_s: since the stack was ready."""

    hit_ratio: float
    ttft_s: float
    bytes_read: int
    ended_s: float


def old_after_s(start: Sequence[Asked], old: Sequence[Asked]) -> float:
    """Until a prompt hit as it did when the stack had run for long; infinite when none did."""
    pairs = zip(start, old, strict=True)
    reached = (now.ended_s for now, then in pairs if now.hit_ratio >= OLD * then.hit_ratio)
    return next(reached, float("inf"))


def main(folder: Path) -> None:
    widen(MODEL, folder / "wide", RECORD_BYTES)
    index(folder / "wide", folder / "store")
    starts: dict[str, list[list[Asked]]] = {"cold": [], "started again": []}
    until: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(ROUNDS):
        cold, old = _start(folder, fresh=True)
        again, _ = _start(folder, fresh=False)
        for name, start in zip(starts, (cold, again), strict=True):
            starts[name].append(start)
            until[name].append(old_after_s(start, old))
    show(
        f"The shipped model widened to experts of {RECORD_BYTES // MIB} MiB, {SHARE} of them in "
        f"memory, {ROUNDS} rounds: the first of {len(PROMPTS)} prompts after a start",
        ["start", "hit ratio", "first token s", "MiB read", f"s until {OLD:.0%} of the old hits"],
        [
            [
                name,
                spread([start[0].hit_ratio for start in found], 3),
                spread([start[0].ttft_s for start in found], 2),
                spread([start[0].bytes_read / MIB for start in found], 0),
                spread(until[name], 1),
            ]
            for name, found in starts.items()
        ],
    )


def _start(folder: Path, fresh: bool) -> tuple[list[Asked], list[Asked]]:
    """All prompts from the last to the first, and all once more, back to the last: it is the one
    that was asked just before a stack started again, and what is asked first then.
    """
    arguments = ("--experts-memory", SHARE)
    with served(folder / "store", folder / "run", *arguments, fresh=fresh) as stack:
        began_s = time.monotonic()
        with stack.client() as node:
            first = [_ask(node, name, began_s) for name in reversed(PROMPTS)]
            old = [_ask(node, name, began_s) for name in PROMPTS]
    return first, old[::-1]


def _ask(node: NodeClient, name: str, began_s: float) -> Asked:
    text = (ROOT / f"tests/bench/prompts/{name}.txt").read_text()[:CHARACTERS]
    options = {"max_tokens": TOKENS, "temperature": 0.9, "seed": 1, "ignore_eos": True}
    result = node.generate(text, **options).run()  # type: ignore[arg-type]
    phases = (result.prefill, result.decode)
    hits = sum(phase.hits for phase in phases)
    return Asked(
        hit_ratio=hits / (hits + sum(phase.misses for phase in phases)),
        ttft_s=result.ttft_s,
        bytes_read=sum(phase.bytes_read for phase in phases),
        ended_s=time.monotonic() - began_s,
    )
