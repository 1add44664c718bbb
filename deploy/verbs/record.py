"""The verb that writes an access trace of decode steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.lab.recorder import Sampling, Wanted
from deploy.lab.recording import StackChoice, record_trace
from deploy.terminal import console, options
from deploy.terminal.output_file import publishing
from deploy.terminal.prompts import read_prompts
from scheduler.simulate.trace import AccessTrace

OUT = typer.Argument(metavar="OUT.npz", help="Trace to write.", show_default=False)
MORE = typer.Argument(metavar="[PROMPTS]...", help="Further prompts.", show_default=False)
PROMPTS = typer.Option(
    metavar="DIR|FILE",
    help="A text is one prompt; a .jsonl has one a line; a folder, all of its .txt and .jsonl.",
)
MODEL = typer.Option(help="Store to start a stack of its own with. (default: the running stack)")
PROMPT_TOKENS = typer.Option(
    min=1, max=options.COUNT_MAX, help="A longer prompt is cut to this many tokens."
)
SEED = typer.Option(
    min=0, max=options.SEED_MAX, help="Of the first generation; the next has the next."
)
SCORES = typer.Option("--scores", help="Record the router's scores of all experts, too.")
PREDICTIONS = typer.Option(
    "--predictions",
    help="Record what predictors said of each layer before, too, for `replay --predict`.",
)


def record(
    out: Annotated[Path, OUT],
    more: Annotated[list[Path] | None, MORE] = None,
    prompts: Annotated[list[Path] | None, PROMPTS] = None,
    max_tokens: Annotated[int, options.MAX_TOKENS] = 128,
    prompt_tokens: Annotated[int, PROMPT_TOKENS] = 64,
    temperature: Annotated[float, options.TEMPERATURE] = 0.8,
    top_p: Annotated[float, options.TOP_P] = 1.0,
    seed: Annotated[int, SEED] = 0,
    ignore_eos: Annotated[bool, options.IGNORE_EOS] = False,
    scores: Annotated[bool, SCORES] = False,
    predictions: Annotated[bool, PREDICTIONS] = False,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    model: Annotated[Path | None, MODEL] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Write which experts every decode step chose, one generation a prompt, as `flashmoe replay`
    reads it. Interrupted, it writes nothing.

    Example: flashmoe record trace.npz --prompts texts/ --max-tokens 256 --temperature 0.8 --seed 1
    """
    flags = {"model": model, "memory": memory, "experts_memory": experts_memory}
    wanted = read_prompts([*(prompts or ()), *(more or ())])
    sampling = Sampling(max_tokens, temperature, top_p, seed, ignore_eos, prompt_tokens)
    with publishing(out) as partial:
        choice = StackChoice(config, run_dir, flags)
        trace = record_trace(out.stem, wanted, sampling, choice, Wanted(scores, predictions))
        trace.save(partial)
    _summarise(out, trace)


def _summarise(out: Path, trace: AccessTrace) -> None:
    said = sum(each.nbytes for each in (*trace.said.values(), trace.truth) if each is not None)
    if said:
        console.err.print(
            f"what was said by {', '.join(trace.said)} takes {said // trace.num_steps:,} bytes a "
            "token before compression"
        )
    console.out.print(
        f"{out}: {trace.num_generations} generations, {trace.num_steps} steps of "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top {trace.top_k}, "
        f"{console.size(out.stat().st_size)}",
    )
