"""The verb that starts a stack of its own, generates once, and stops it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from compute_node.client.result import Generation, Result
from deploy.report.summary import print_summary
from deploy.stack.connection import connected
from deploy.stack.launcher import own_stack
from deploy.terminal import console, options
from deploy.terminal.prompts import choose_prompt
from deploy.terminal.signals import stop_flag
from proto.memory_report import MemoryReport


def run(
    prompt: Annotated[str | None, options.PROMPT] = None,
    prompt_file: Annotated[Path | None, options.PROMPT_FILE] = None,
    model: Annotated[Path | None, options.MODEL] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    max_tokens: Annotated[int, options.MAX_TOKENS] = 128,
    temperature: Annotated[float, options.TEMPERATURE] = 0.0,
    seed: Annotated[int | None, options.SEED] = None,
    ignore_eos: Annotated[bool, options.IGNORE_EOS] = False,
    quality: Annotated[str | None, options.DEFAULT_QUALITY] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Start a stack of its own, generate once, print a summary, stop.

    Example: flashmoe run "Once upon a time" --model ~/stores/olmoe --memory 4GiB
    """
    text = choose_prompt(prompt, prompt_file)
    stopped = stop_flag()
    flags = {
        "model": model,
        "memory": memory,
        "experts_memory": experts_memory,
        "quality": quality,
    }
    with own_stack(config, flags, stopped) as (stack, run), ThreadPoolExecutor(1) as threads:
        if stopped():
            raise typer.Abort
        with connected(run) as node:
            generation = node.generate(
                text,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                ignore_eos=ignore_eos,
            )
            writing = threads.submit(_write_all, text, generation)
            stack.watch(lambda: writing.done() or stopped())
            generation.cancel()  # does nothing to one that is through
            if stopped() and not generation.result:
                raise typer.Abort
            result = writing.result()
        stack.write_memory()
        report = MemoryReport.read(run.path)
    print_summary(result, report)


def _write_all(prompt: str, generation: Generation) -> Result:
    console.write_all(chain([prompt], (piece.text for piece in generation)))
    return generation.run()
