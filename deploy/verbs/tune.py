"""The verb that measures what lossy routes cost and bring on one store, and writes its quality
card.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from compute_node.client.node_client import NodeClient
from deploy.lab import quality_plot
from deploy.lab.knobs import knobs_of
from deploy.lab.route_trials import RouteTrials, cut
from deploy.lab.tuning import Tuning
from deploy.lab.wish import Wish
from deploy.report import quality_report
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.launcher import own_stack
from deploy.stack.stack_plan import check_whole, load_store, plan_stack_memory
from deploy.terminal import console, options
from deploy.terminal.output_file import publishing
from deploy.terminal.progress import NowAndThen
from deploy.terminal.prompts import read_prompts
from deploy.terminal.signals import stop_flag, work_until_stopped
from expert_store.manifest.manifest import Manifest
from proto import errors
from proto.quality import QUALITY_NAME, Budget, QualityCard, Setting

_MOST_NAMES = 200  # characters

TEXT = typer.Option(
    metavar="FILE",
    help='Like what the model is used for: a text, or a .jsonl with one {"text": ...} a line; a '
    "folder, all of its.",
    show_default=False,
)
QUALITY = typer.Option(
    metavar="BUDGET", help="By how much perplexity may rise, as 1%. (default: 1%)"
)
LATENCY = typer.Option(metavar="TIME", help="Instead of a budget: the most time a token, as 80ms.")
MAX_TOKENS = typer.Option(
    min=64, max=options.COUNT_MAX, help="Tokens of text to score for each setting."
)
PASSAGE = typer.Option(min=16, max=options.COUNT_MAX, help="Tokens of each passage of the text.")
SETTINGS = typer.Option(min=1, max=1000, help="The most settings to measure besides exact.")
OUT = typer.Option(metavar="FILE", help="Card to write. (default: quality.json in the store)")
REMEDY = "give --out FILE, and quality_path = FILE in the [compute_node] table of flashmoe.toml"


def tune(
    store: Annotated[Path, options.STORE],
    text: Annotated[list[Path], TEXT],
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    quality: Annotated[str | None, QUALITY] = None,
    latency: Annotated[str | None, LATENCY] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 2048,
    passage_tokens: Annotated[int, PASSAGE] = 256,
    settings: Annotated[int, SETTINGS] = 20,
    out: Annotated[Path | None, OUT] = None,
    as_json: Annotated[bool, options.JSON] = False,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Find the fastest decoding within a quality budget, or the truest within a time a token, on
    this store, this memory and your text: some minutes, more for a large model.

    Scores the text token by token, exactly and under lossy routes, by a stack of its own; writes
    the quality card, quality.json, from which `--quality` is served, and beside it quality.md in
    plain words and quality.svg. Nothing lossy runs unless --quality asks for it.

    Example: flashmoe tune ~/stores/olmoe --text ~/notes --memory 4GiB --quality 1%
    """
    wish, path = Wish.of(quality, latency), _card_path(store, out)
    flags = {"model": store, "memory": memory, "experts_memory": experts_memory}
    manifest, experts_bytes = _check_memory(ServeSettings.load(config).with_flags(**flags))
    passages = cut(read_prompts(text), max(1, max_tokens // passage_tokens), passage_tokens)
    stopped = stop_flag()
    with ExitStack() as files:
        card_file, words, picture = (
            files.enter_context(publishing(path.with_suffix(suffix), REMEDY))
            for suffix in (path.suffix, ".md", ".svg")
        )
        with (
            own_stack(config, flags, stopped, is_tuned=False) as (stack, run),
            NodeClient(run.address("compute_node")) as node,
        ):
            tuning = Tuning(
                RouteTrials(node, passages, passage_tokens, _progress(len(passages))),
                knobs_of(bool(manifest.spec.variants)),
                wish.goal,
                settings,
                console.say,
            )
            measured = work_until_stopped(tuning.run, tuning.trials.cancel, stack.watch, stopped)
        card = QualityCard(
            fingerprint=manifest.spec.fingerprint,
            experts_bytes=experts_bytes,
            texts=", ".join(file.name for file in text)[:_MOST_NAMES],
            num_texts=len(passages),
            num_tokens=tuning.num_tokens,
            num_checked=tuning.num_checked,
            settings=measured,
        )
        chosen, name = wish.choose(card), store.resolve().name
        card.write(card_file)
        words.write_text(quality_report.document(card, name, chosen, str(wish)))
        quality_plot.draw(picture, card, f"{name}: tokens a second over perplexity")
    if as_json:
        figures = {"card": str(path), "chosen": chosen.model_dump()}
        console.print_json(figures | card.model_dump(mode="json"))
    else:
        _print(card, chosen, path, wish.served(chosen))
    wish.check(chosen)


def _card_path(store: Path, out: Path | None) -> Path:
    """Raises InvalidRequest for a name that those of the other files could be."""
    if out is not None and out.suffix != ".json":
        raise errors.InvalidRequest(f"{out} is no card's name: give --out one that ends in .json")
    return out or store / QUALITY_NAME


def _check_memory(settings: ServeSettings) -> tuple[Manifest, int]:
    """The store's manifest, and the memory for experts. Raises ConfigInvalid when all experts are
    in memory, and as `plan_stack_memory` does.
    """
    assert settings.model is not None
    manifest = load_store(settings.model)
    check_whole(settings.model, manifest)
    ceiling_bytes = parse_bytes(settings.memory, "--memory") if settings.memory else None
    plan = plan_stack_memory(settings, settings.model, manifest, ceiling_bytes)
    if plan.slots >= plan.num_experts:
        raise errors.ConfigInvalid(
            "all experts are in this memory, where no lossy rule does anything: give less "
            "--memory or --experts-memory, or serve it as it is"
        )
    return manifest, plan.experts_bytes


def _progress(num_passages: int) -> Callable[[int], None]:
    due = NowAndThen()

    def report(num_done: int) -> None:
        if due.elapsed_s():
            console.say(f"{num_done}/{num_passages} passages of this setting")

    return report


def _print(card: QualityCard, chosen: Setting, path: Path, budget: Budget) -> None:
    found = sorted(card.settings, key=lambda setting: (not setting.is_exact, setting.token_ms))
    lines = [quality_report.HEADER, *quality_report.rows(found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        console.out.print("  ".join(cell.rjust(width) for cell, width in cells))
    console.out.print("")
    console.out.print(f"chosen: {quality_report.bought(card, chosen)}")
    if not chosen.is_exact:
        console.out.print(f"{path}: `flashmoe serve --quality {budget}` serves it")
