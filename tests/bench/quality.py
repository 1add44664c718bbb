"""What lossy routes cost and bring on the shipped model, by text of eleven domains.

    python -m tests.bench.quality TEXT [--plot quality.svg]

TEXT: a .jsonl with {"text": ..., "domain": ...} a line, or a folder with a .txt for each domain.
Scored token by token by a real stack whose store holds int4 records, too; bytes and perplexity over
exact of the same run, and of each domain alone, pooled. Speed is measured apart, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, median

import matplotlib
from matplotlib import pyplot

from compute_node.client.node_client import NodeClient
from deploy.lab.perplexity import Comparison, TextScore, TextScorer
from deploy.terminal.prompts import Prompt, read_prompts
from expert_store.offline.pack import pack
from tests.bench.table import machine, show, spread
from tests.stack import MODEL, served

matplotlib.use("Agg")

MEMORIES = {"12 of 32 slots a layer": "37.5%", "8 of 32 slots a layer": "25%"}
ROUTES = (
    "exact",
    "prior .05 + skip .5",
    "prior .1 + skip .75",
    "precision .99",
    "skip .25 + precision .99",
    "skip .5 + precision .99",
    "precision 1",
    "prior .1 + skip .5 + precision 1",
)
BUDGETS = (0.001, 0.005, 0.01)
DOMAIN_TIMES = 3  # a domain may cost this many budgets
CONTEXT, DOMAIN_TOKENS = 256, 2048
SPEED_TOKENS, SPEED_ROUNDS = 256, 3
SETTINGS = "[compute_node]\nthreads = 1\n"  # tiny matrices gain nothing from a second thread

Scores = dict[str, TextScore]
"""Of each domain."""


def by_domain(texts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    found = dict[str, list[Prompt]]()
    for text in texts:
        found.setdefault(text.name, []).append(text)
    return {name: found[name] for name in sorted(found)}


def score_domain(node: NodeClient, texts: Sequence[Prompt], route: str) -> TextScore:
    """As many contexts of each text as make DOMAIN_TOKENS, if the texts are that long."""
    share = CONTEXT * -(-DOMAIN_TOKENS // (CONTEXT * len(texts)))
    chosen = texts[: -(-DOMAIN_TOKENS // share)]
    return TextScorer(node, share, CONTEXT, route).run(chosen, lambda number, text: None)


def together(scores: Scores) -> TextScore:
    return TextScore(
        tuple(chain.from_iterable(score.texts for score in scores.values())),
        sum(score.wall_s for score in scores.values()),
        sum(score.bytes_read for score in scores.values()),
        tuple(chain.from_iterable(score.token_s for score in scores.values())),
    )


@dataclass(frozen=True)
class Measured:
    """domains: perplexity over exact of each, pooled"""

    route: str
    num_tokens: int
    bytes_ratio: float
    total: Comparison
    domains: dict[str, float]
    tokens_per_s: list[float]

    @classmethod
    def of(cls, route: str, scores: Scores, exact: Scores, speeds: list[float]) -> Measured:
        total, baseline = together(scores), together(exact)
        domains = {name: Comparison.of(scores[name], exact[name]).ratio for name in scores}
        return cls(
            route,
            len(total.scored),
            total.bytes_per_token / baseline.bytes_per_token,
            Comparison.of(total, baseline),
            domains,
            speeds,
        )

    def is_within(self, budget: float) -> bool:
        """Of the whole, and three times of every domain."""
        return self.total.ratio <= 1 + budget and all(
            ratio <= 1 + DOMAIN_TIMES * budget for ratio in self.domains.values()
        )


def speeds(node: NodeClient, text: Prompt, routes: Sequence[str]) -> dict[str, list[float]]:
    """Tokens a second, every route once a round."""
    found: dict[str, list[float]] = {route: [] for route in routes}
    for _ in range(SPEED_ROUNDS):
        for route in routes:
            scorer = TextScorer(node, SPEED_TOKENS, SPEED_TOKENS, route)
            score = scorer.run([text], lambda number, text: None)
            found[route].append(1 / fmean(chain.from_iterable(score.token_s)))
    return found


@contextmanager
def node_of(store: Path, folder: Path, experts_memory: str) -> Iterator[NodeClient]:
    config = folder / "flashmoe.toml"
    config.write_text(SETTINGS)
    flags = ["--experts-memory", experts_memory, "--config", str(config)]
    with served(store, folder / "run", *flags) as stack, stack.client() as node:
        yield node


def measure(node: NodeClient, texts: dict[str, list[Prompt]]) -> list[Measured]:
    """Exact is the first of the routes."""
    scores = {
        route: {name: score_domain(node, found, route) for name, found in texts.items()}
        for route in ROUTES
    }
    fast = speeds(node, next(iter(texts.values()))[0], ROUTES)
    return [Measured.of(route, scores[route], scores[ROUTES[0]], fast[route]) for route in ROUTES]


def print_table(memory: str, found: Sequence[Measured]) -> None:
    rows = [
        (
            one.route,
            f"{one.bytes_ratio:.3f}",
            f"{one.total.ratio:.4f}",
            f"{one.total.low:.4f}-{one.total.high:.4f}",
            f"{one.total.worst_text:.3f}",
            f"{max(one.domains.values()):.4f} {max(one.domains, key=one.domains.__getitem__)}",
            spread(one.tokens_per_s),
        )
        for one in found
    ]
    header = ["route", "bytes", "perplexity", "two errors", "worst text", "worst domain"]
    show(f"{memory}, {found[0].num_tokens:,} tokens, over exact", [*header, "tokens/s"], rows)
    best = [(f"{budget:.1%}", *_fewest_bytes(found, budget)) for budget in BUDGETS]
    show("Fewest bytes within a budget", ["budget", "route", "bytes over exact"], best)


def _fewest_bytes(found: Sequence[Measured], budget: float) -> tuple[str, str]:
    within = [one for one in found if one.is_within(budget)]
    best = min(within, key=lambda one: one.bytes_ratio)
    return best.route, f"{best.bytes_ratio:.3f}"


def draw(out: Path, by_memory: dict[str, list[Measured]]) -> None:
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for memory, found in by_memory.items():
        points = [(100 * (one.total.ratio - 1), median(one.tokens_per_s)) for one in found]
        axes.scatter(*zip(*points, strict=True), label=memory, s=22)
        for one, point in zip(found, points, strict=True):
            axes.annotate(one.route, point, (5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="perplexity above exact, %", ylabel="tokens a second, median")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    texts = by_domain(read_prompts([given.text]))
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="fm-bench-", dir=Path.cwd()) as scratch:
        folder = Path(scratch)
        pack(MODEL, folder / "store", variants=("int4",))
        by_memory = dict[str, list[Measured]]()
        for memory, share in MEMORIES.items():
            with node_of(folder / "store", folder, share) as node:
                by_memory[memory] = measure(node, texts)
            print_table(memory, by_memory[memory])
    if given.plot:
        draw(given.plot, by_memory)


if __name__ == "__main__":
    main()
