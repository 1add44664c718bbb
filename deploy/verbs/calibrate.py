"""The verb that trains the `learned` policy's forecaster and the router map for one store, on this
box.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from compute_node.kernels import processors
from deploy.lab.recorder import Sampling
from deploy.lab.recording import StackChoice, record_trace
from deploy.settings import router_map_beside
from deploy.stack.stack_plan import load_store
from deploy.terminal import console, options
from deploy.terminal.output_file import publishing
from deploy.terminal.prompts import Prompt, read_prompts
from expert_store.manifest.manifest import Manifest
from proto import errors
from scheduler.config import FORECASTER_NAME
from scheduler.simulate.trace import AccessTrace, TraceInvalid

PASSAGE_CHARACTERS = 600

TEXT = typer.Option(help="Text to generate from: files or folders; repeat for more.")
TRACE = typer.Option(help="Trace of this model, made by `flashmoe record`.")
GENERATIONS = typer.Option(min=4, help="The most generations, from passages of the texts.")
OUT = typer.Option(metavar="FILE", help="What to write. (default: beside the manifest)")
UPDATES = typer.Option(min=1, help="The most updates; it stops earlier when nothing is gained.")
TOKENS = typer.Option(min=8, max=options.COUNT_MAX, help="New tokens of each generation.")
PROMPT_TOKENS = 64
REMEDY = "give --out FILE, and start with `flashmoe serve --forecaster FILE`"


def calibrate(
    store: Annotated[Path, options.STORE],
    text: Annotated[list[Path] | None, TEXT] = None,
    trace: Annotated[Path | None, TRACE] = None,
    generations: Annotated[int, GENERATIONS] = 80,
    max_tokens: Annotated[int, TOKENS] = 200,
    temperature: Annotated[float, options.TEMPERATURE] = 0.8,
    seed: Annotated[int, options.SEED] = 0,
    max_updates: Annotated[int, UPDATES] = 1200,
    out: Annotated[Path | None, OUT] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Learn ahead which experts this model uses after which, for better advice and better guesses
    from the first token on; a few minutes. Text should be like what the model will be used for.

    Generates from passages of the text with a running stack, or with one of its own when --memory
    is given; writes forecaster.safetensors and router_map.safetensors beside the manifest, where
    `flashmoe serve` finds them, or NAME.safetensors given with --out and, beside it,
    NAME.router_map.safetensors, for `flashmoe serve --forecaster`. An older map that no new one
    replaces is removed.

    Example: flashmoe calibrate ~/stores/olmoe --text ~/notes --memory 4GiB
    """
    import torch

    from deploy.lab.calibrated_map import MapCalibration
    from scheduler.lab.calibration import calibrate as train  # imports torch
    from scheduler.lab.calibration_settings import CalibrationSettings

    manifest = load_store(store)
    if (trace is None) == (not text):
        raise errors.InvalidRequest("give either --text FILES or --trace TRACE")
    out_path = out or store / FORECASTER_NAME
    with ExitStack() as lasting:
        with publishing(out_path, REMEDY) as partial:
            routers = lasting.enter_context(
                MapCalibration(manifest.spec, router_map_beside(out_path), say)
            )
            if trace is not None:
                known = AccessTrace.load(trace)
            else:
                sampling = Sampling(max_tokens, temperature, 1.0, seed, True, PROMPT_TOKENS)
                prompts = passages(read_prompts(text or []), generations, seed)
                model = store if memory else None
                flags = {"model": model, "memory": memory, "experts_memory": experts_memory}
                choice = StackChoice(config, run_dir, flags, is_calibrated=False)
                known = record_trace(
                    "calibration", prompts, sampling, choice, routers.wanted, routers.take
                )
            check_trace(known, manifest)
            torch.set_num_threads(processors.usable())
            settings = CalibrationSettings(max_updates=max_updates, seed=seed)
            train(known, settings, say, manifest.spec.fingerprint).save(partial)
        user = f"flashmoe serve --forecaster {out}" if out else "flashmoe serve"
        console.out.print(
            f"{out_path}: trained on {known.num_steps} steps of "
            f"{known.num_generations} generations; the next `{user}` uses it",
        )
        routers.train()


def say(line: str) -> None:
    """Progress, on stderr."""
    console.err.print(line)


def passages(texts: Sequence[Prompt], most: int, seed: int) -> list[Prompt]:
    """Passages of the texts in random order: equally many of each text, until one has no more."""
    draw = random.Random(seed)
    piles = [list(_cut(text)) for text in texts]
    for pile in piles:
        draw.shuffle(pile)
    taken = [pile[turn] for turn in range(most) for pile in piles if turn < len(pile)][:most]
    draw.shuffle(taken)
    return taken


def _cut(text: Prompt) -> Iterator[Prompt]:
    """Cut a text at white space into passages of about PASSAGE_CHARACTERS."""
    words = text.text.split(" ")
    passage: list[str] = []
    for word in words:
        passage.append(word)
        if sum(map(len, passage)) + len(passage) >= PASSAGE_CHARACTERS:
            yield Prompt(text.name, " ".join(passage))
            passage = []
    if passage:
        yield Prompt(text.name, " ".join(passage))


def check_trace(trace: AccessTrace, manifest: Manifest) -> None:
    """Raises TraceInvalid when a trace cannot be of this store's model."""
    spec = manifest.spec
    of_store = (len(spec.moe_layers), spec.num_experts, spec.top_k)
    if (*trace.shape, trace.top_k) != of_store:
        raise TraceInvalid(
            f"{trace.name} has {trace.num_layers} layers x {trace.num_experts} experts, top "
            f"{trace.top_k}, the store's model {of_store[0]} x {of_store[1]}, top {of_store[2]}: "
            "record a trace of this model"
        )
