"""How soon a quality guard notices a setting that costs more than its card says, and how often it
suspects one that does not; on the shipped model, 12 of 32 slots a layer.

    python -m tests.bench.guard TEXT [--runs 10] [--honest-runs 1] [--parts planted,...]

TEXT: prompts, as `flashmoe eval --text` takes them. Generated at temperature 1 by a real node from
their beginnings. `simulated`: a guard hears of recorded checks, text after text drawn anew.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from compute_node.client.node_client import NodeClient
from compute_node.quality.divergence import Divergence
from compute_node.quality.guard import Guard
from compute_node.quality.turns import Rung
from deploy.terminal.prompts import Prompt, read_prompts
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from proto.quality import Budget, QualityCard, Setting
from tests.bench.table import machine, percentile, show, spread
from tests.daemons import daemon, node_table, store_table
from tests.stack import MODEL

SLOTS = 96
BUDGETS = (0.001, 0.005, 0.01)
PLANTED = "prior .6"
HONEST = "prior .05 + skip .5"
HONEST_BUDGETS = (0.005, 0.01)  # that it is within
NEVER, MANY = 4000, 5000  # tokens
PIECE_TOKENS, PROMPT_CHARACTERS = 128, 200
RECORDED_TOKENS, CHECK_EVERY, SIMULATED_RUNS = 96, 2, 200

Told = Sequence[Divergence]
"""What checks found of one text, in order."""


def card_of(store_dir: Path, path: Path, route: str) -> Path:
    """It says of the route that it costs next to nothing."""
    settings = [_setting("", 0.0, 10.0), _setting(route, 1e-5, 20.0)]
    QualityCard(
        fingerprint=Manifest.load(store_dir).spec.fingerprint,
        experts_bytes=1,
        texts="none",
        num_texts=1,
        num_tokens=1,
        settings=tuple(settings),
    ).write(path)
    return path


def _setting(route: str, kl: float, tokens_per_s: float) -> Setting:
    return Setting(
        route=route,
        perplexity=1.0,
        perplexity_low=1.0,
        perplexity_high=1.0,
        worst_text=1.0,
        kl=kl,
        top1=1.0,
        bytes_ratio=1.0,
        bytes_per_token=1.0,
        tokens_per_s=tokens_per_s,
        token_ms_p50=1.0,
        token_ms_p95=1.0,
    )


@contextmanager
def node_with(route: str) -> Iterator[NodeClient]:
    with tempfile.TemporaryDirectory(prefix="fm-guard-") as folder:
        run, store_dir = Path(folder), Path(folder) / "store"
        index(MODEL, store_dir)
        card = card_of(store_dir, run / "quality.json", route)
        table = node_table(run, "n", SLOTS, quality_path=str(card), threads=1)
        with (
            daemon("expert_store", run, store_table(store_dir, run, SLOTS + 4)),
            daemon("compute_node", run, table, "n") as started,
            NodeClient(started.address) as client,
        ):
            yield client


def tokens_until_left(
    node: NodeClient, prompts: Sequence[Prompt], quality: str, seed: int, most: int
) -> tuple[int, int, bool]:
    """By the route of the card, until the guard leaves it: tokens, checks, and whether it did."""
    order, num_tokens, num_checks = random.Random(seed), 0, 0
    while num_tokens < most:
        prompt = order.choice(prompts).text[:PROMPT_CHARACTERS]
        result = node.generate(
            prompt,
            max_tokens=PIECE_TOKENS,
            temperature=1.0,
            seed=order.randrange(1 << 30),
            ignore_eos=True,
            quality=quality,
        ).run()
        num_tokens += sum(num for route, num in result.routes.items() if route)
        num_checks += result.decode.checks
        if "" in result.routes:
            return num_tokens, num_checks, True
    return num_tokens, num_checks, False


def alike(budget: float, number: int) -> str:
    """A budget that differs from others by less than matters: a node keeps a guard for each."""
    return f"{100 * budget * (1 + 1e-5 * number):.6g}%"


def planted(prompts: Sequence[Prompt], given: argparse.Namespace) -> None:
    rows = []
    with node_with(PLANTED) as node:
        for budget in BUDGETS:
            runs = [
                tokens_until_left(node, prompts, alike(budget, seed), seed, NEVER)
                for seed in range(given.runs)
            ]
            tokens, checks = [run[0] for run in runs], [run[1] for run in runs]
            late = sum(num > 1000 for num in tokens)
            missed = sum(not run[2] for run in runs)
            rows.append([f"{budget:.1%}", spread(tokens, 0), spread(checks, 0), late, missed])
            print(f"  {budget:.1%}: tokens {tokens}, checks {checks}", flush=True)
    header = ["budget", "tokens until undone", "checks", "beyond 1,000", "never"]
    show(f"planted: {PLANTED}, said to cost nothing, {given.runs} runs", header, rows)


def honest(prompts: Sequence[Prompt], given: argparse.Namespace) -> None:
    rows = []
    with node_with(HONEST) as node:
        for budget in HONEST_BUDGETS:
            qualities = [alike(budget, seed) for seed in range(given.honest_runs)]
            runs = [
                tokens_until_left(node, prompts, quality, seed, given.tokens)
                for seed, quality in enumerate(qualities)
            ]
            guards = node.stats().by("budget")
            kls = [guards[quality].quality_kl for quality in qualities]
            found = [kl for kl in kls if kl is not None]
            left, checks = [run[0] for run in runs if run[2]], [run[1] for run in runs]
            rows.append([f"{budget:.1%}", len(left), left, spread(checks, 0), spread(found, 5)])
    header = ["budget", "left", "after tokens", "checks", "KL"]
    title = f"honest: {HONEST}, {given.honest_runs} runs of {given.tokens:,} tokens"
    show(title, header, rows)


def record(node: NodeClient, prompts: Sequence[Prompt], route: str) -> list[Told]:
    found = list[Told]()
    for prompt in prompts:
        scored = node.score(
            prompt.text, max_tokens=RECORDED_TOKENS, route=route, check_every=CHECK_EVERY
        )
        told = [(token.kl, token.agrees) for token in scored]
        found.append([Divergence(kl, bool(top1)) for kl, top1 in told if kl is not None])
    return [told for told in found if told]


def simulate(texts: Sequence[Told], budget: float, seed: int, most: int) -> int:
    """Tokens until a guard leaves the route; beyond `most`: it does not. Text after text is drawn,
    whose tokens are known at each CHECK_EVERY-th.
    """
    order = random.Random(seed)
    guard = Guard(Budget(budget), (Rung(), Rung("lossy")))
    drawn = itertools.chain.from_iterable(
        itertools.repeat(one, CHECK_EVERY)
        for told in iter(lambda: order.choice(texts), None)
        for one in told
    )
    for number, found in enumerate(drawn, start=1):
        turn = guard.next()
        if turn.is_checked:
            guard.heard(turn, found)
        if guard.num_tightened or number > most:
            return number
    raise AssertionError("texts are drawn without end")


def simulated(prompts: Sequence[Prompt], _: argparse.Namespace) -> None:
    rows = []
    logging.disable(logging.WARNING)
    with node_with(HONEST) as node:
        for route, budgets in ((HONEST, HONEST_BUDGETS), (PLANTED, BUDGETS)):
            texts = record(node, prompts, route)
            kls = [one.kl for told in texts for one in told]
            for budget in budgets:
                left = [simulate(texts, budget, seed, MANY) for seed in range(SIMULATED_RUNS)]
                within = sum(num <= MANY for num in left)
                tokens = [percentile(left, share) for share in (0.1, 0.5, 0.9)]
                facts = [f"{fmean(kls):.5f}", len(kls), f"{budget:.1%}"]
                rows.append([route, *facts, f"{within} of {SIMULATED_RUNS}", *tokens])
    logging.disable(logging.NOTSET)
    header = ["route", "KL", "checks", "budget", "left in 5,000 tokens", "10 %", "50 %", "90 %"]
    show("simulated from recorded checks, whole texts drawn anew", header, rows)


PARTS: dict[str, Callable[[Sequence[Prompt], argparse.Namespace], None]] = {
    "planted": planted,
    "honest": honest,
    "simulated": simulated,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--honest-runs", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=MANY)
    parser.add_argument("--parts", default=",".join(PARTS))
    given = parser.parse_args()
    print(f"{machine()}\n")
    prompts = read_prompts([given.text])
    for name in given.parts.split(","):
        PARTS[name](prompts, given)


if __name__ == "__main__":
    main()
