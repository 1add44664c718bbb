"""The whole stack at 100, 50, 37.5 and 25 % of the experts: tokens/s, bytes, hit ratio; cold and
warm.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Result
from expert_store.offline.index import index
from tests.bench.table import show, spread
from tests.stack import MODEL, served

PROMPTS = (
    "In the beginning God created",
    "def __init__(self, name):",
    "NAME\n       ls - list directory",
    "The quick brown fox",
    "Der Befehl",
)
SHARES = ("100%", "50%", "37.5%", "25%")
TOKENS, ROUNDS = 64, 3


def main(folder: Path) -> None:
    index(MODEL, folder / "store")
    rows = []
    for share in SHARES:
        with served(folder / "store", folder / "run", "--experts-memory", share) as stack:
            with stack.client() as node:
                rounds = [[_run(node, n) for n in range(len(PROMPTS))] for _ in range(ROUNDS)]
            peak = stack.status()["memory"]["peak_bytes"]
        rows.append(_row(share, "cold", rounds[:1], peak))
        rows.append(_row(share, "warm", rounds[1:], peak))
    show(
        f"The shipped model, {len(PROMPTS)} prompts of different domains, {TOKENS} tokens each, "
        "temperature 0.9, seeded",
        ["experts", "", "tokens/s", "KiB/token", "hit ratio", "stall", "ttft ms", "peak MiB"],
        rows,
    )


def _run(node: NodeClient, number: int) -> Result:
    options = {"max_tokens": TOKENS, "temperature": 0.9, "seed": number, "ignore_eos": True}
    return node.generate(PROMPTS[number], **options).run()  # type: ignore[arg-type]


def _row(share: str, state: str, rounds: list[list[Result]], peak_bytes: int) -> list[object]:
    results = [result for one in rounds for result in one]
    decode = [result.decode for result in results]
    tokens = sum(phase.tokens for phase in decode)
    return [
        share,
        state,
        spread([result.tokens_per_s for result in results]),
        f"{sum(phase.bytes_read for phase in decode) / tokens / 1024:.0f}",
        f"{statistics.fmean(phase.hit_ratio for phase in decode):.3f}",
        f"{sum(p.stall_s for p in decode) / sum(p.wall_s for p in decode):.0%}",
        f"{statistics.median(result.ttft_s for result in results) * 1e3:.0f}",
        f"{peak_bytes / 2**20:.0f}",
    ]
