"""The verb that measures a store's model on held-out text: perplexity, as decode computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from compute_node.client.node_client import NodeClient
from deploy.lab.perplexity import Comparison, TextScore, TextScorer
from deploy.stack.launcher import own_stack
from deploy.stack.stack_plan import load_store
from deploy.terminal import console, options
from deploy.terminal.progress import NowAndThen
from deploy.terminal.prompts import Prompt, read_prompts
from deploy.terminal.signals import stop_flag, work_until_stopped
from expert_store.offline.card import check_card, write_perplexity
from proto import errors
from proto.quality import EXACT_NAME

TEXT = typer.Option(
    metavar="FILE",
    help='A text, or a .jsonl with one {"text": ...} a line; a folder, all of its.',
    show_default=False,
)
AGAINST = typer.Option(metavar="STORE2", help="Score it too, and compare: the exact store, say.")
MAX_TOKENS = typer.Option(
    min=0, max=options.COUNT_MAX, help="Tokens in all, as many of each text; 0: all of them."
)
CONTEXT = typer.Option(
    min=2, max=options.COUNT_MAX, help="Longer texts are scored in parts of this many tokens."
)
CARD = typer.Option("--card", help="Write the figures into the store's README.md.")


def eval(
    store: Annotated[Path, options.STORE],
    text: Annotated[list[Path], TEXT],
    against: Annotated[Path | None, AGAINST] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 0,
    context_tokens: Annotated[int, CONTEXT] = 512,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    route: Annotated[str, options.ROUTE] = "",
    quality: Annotated[str, options.QUALITY] = "",
    card: Annotated[bool, CARD] = False,
    as_json: Annotated[bool, options.JSON] = False,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Perplexity of a store's model on held-out text, scored token by token as decode does, by a
    stack of its own. Without --memory and --experts-memory all experts are in memory.

    Example: flashmoe eval /nvme/olmoe-int4 --text heldout.jsonl --against ~/stores/olmoe
    """
    texts = read_prompts(text)
    if card:
        check_card(store)
    if memory is None and experts_memory is None:
        if route or quality:
            raise errors.ConfigInvalid(
                "--route and --quality change nothing where all experts are in memory: give "
                "--memory or --experts-memory, too"
            )
        experts_memory = "100%"
    share = -(-max_tokens // len(texts))
    stopped = stop_flag()

    def measure(model: Path, way: _Way) -> _Measured:
        flags = {"model": model, "memory": memory, "experts_memory": experts_memory}
        within = f"{memory or experts_memory} in memory"
        limits = (share, context_tokens)
        return _Measured(model, way, within, _score(config, flags, texts, way, limits, stopped))

    scores = [measure(store, _Way(route, quality))]
    scores += [measure(against, _Way())] if against else []
    comparison = Comparison.of(scores[0].score, scores[1].score) if against else None
    if card:
        write_perplexity(store, _card_figures(texts, scores, comparison, context_tokens))
    if as_json:
        console.print_json(_document(scores, comparison))
    else:
        _print(scores, comparison)


@dataclass(frozen=True)
class _Way:
    """How experts are chosen: by a route, or within a quality budget; by neither, exactly."""

    route: str = ""
    quality: str = ""

    def __str__(self) -> str:
        if self.route:
            return f"routed by {self.route}"
        return f"within a quality budget of {self.quality}" if self.quality else ""

    def scorer(
        self, node: NodeClient, limits: tuple[int, int], report: Callable[[int], None]
    ) -> TextScorer:
        """Exact is asked for by name: the node's default may be lossy. limits: tokens of a text,
        and of a part of it
        """
        quality = self.quality or ("" if self.route else EXACT_NAME)
        return TextScorer(node, *limits, self.route, quality=quality, report=report)


@dataclass(frozen=True)
class _Measured:
    """within: the memory on which what a way costs depends"""

    store: Path
    way: _Way
    within: str
    score: TextScore

    @property
    def weights(self) -> str:
        weights = str(load_store(self.store).spec.weight_format)
        return f"{weights}, {self.way}, {self.within}" if str(self.way) else weights


def _score(
    config: Path | None,
    flags: Mapping[str, Any],
    texts: Sequence[Prompt],
    way: _Way,
    limits: tuple[int, int],
    stopped: Callable[[], bool],
) -> TextScore:
    """Score the texts with a stack of its own.

    limits: the most tokens of a text, and of one part of it
    Raises KeyboardInterrupt when the user stops it.
    """

    def say(number: int, text: Prompt) -> None:
        console.err.print(f"{number + 1}/{len(texts)} {text.name}")

    due = NowAndThen()

    def report(num_tokens: int) -> None:
        if due.elapsed_s():
            console.say(f"{num_tokens:,} tokens of this text")

    with (
        own_stack(config, flags, stopped) as (stack, run),
        NodeClient(run.address("compute_node")) as node,
    ):
        scorer = way.scorer(node, limits, report)
        work = partial(scorer.run, texts, say)
        return work_until_stopped(work, scorer.cancel, stack.watch, stopped)


def _document(scores: Sequence[_Measured], comparison: Comparison | None) -> dict[str, Any]:
    found = [
        {
            "store": str(one.store),
            "weights": one.weights,
            "route": one.way.route,
            "quality": one.way.quality,
            "tokens": len(one.score.scored),
            "nats_per_token": one.score.nats_per_token,
            "bits_per_token": one.score.bits_per_token,
            "perplexity": one.score.perplexity,
            "bytes_per_token": one.score.bytes_per_token,
            "tokens_per_s": one.score.tokens_per_s,
        }
        for one in scores
    ]
    document: dict[str, Any] = dict(found[0])
    if comparison:
        document |= {"against": found[1], "perplexity_ratio": asdict(comparison)}
    return document


def _print(scores: Sequence[_Measured], comparison: Comparison | None) -> None:
    for one in scores:
        score = one.score
        rows = {
            "weights": one.weights,
            "tokens": f"{len(score.scored):,}, {score.tokens_per_s:.1f} a second",
            "nats a token": f"{score.nats_per_token:.4f} ({score.bits_per_token:.4f} bits)",
            "perplexity": f"{score.perplexity:.4f}",
            "read per token": console.size(score.bytes_per_token),
        }
        console.out.print(console.table(str(one.store), rows))
    if comparison:
        console.out.print(f"perplexity ratio {_ratio(comparison)}")


def _ratio(comparison: Comparison) -> str:
    return f"{comparison.ratio:.5f} ({comparison.low:.5f} to {comparison.high:.5f}, two errors)"


def _card_figures(
    texts: Sequence[Prompt],
    scores: Sequence[_Measured],
    comparison: Comparison | None,
    context_tokens: int,
) -> str:
    lines = [
        f"Over {len(texts)} held-out texts in parts of {context_tokens} tokens, token by token as "
        "decode computes them",
        "(`flashmoe eval`):",
        "",
        "| weights | tokens | nats a token | perplexity |",
        "|---|---|---|---|",
    ]
    for one in scores:
        score = one.score
        row = f"{len(score.scored):,} | {score.nats_per_token:.4f} | {score.perplexity:.4f}"
        lines.append(f"| {one.weights} | {row} |")
    if comparison:
        lines += ["", f"Ratio of perplexities: {_ratio(comparison)}."]
    return "\n".join(lines)
