"""The verb that writes an access trace: decode steps of a stack that runs, or of one of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Result
from deploy.lab.recorder import Drawing, Recorder, to_trace
from deploy.settings import ServeSettings
from deploy.stack.run_dir import RunDir
from deploy.terminal import console
from deploy.terminal.prompts import Prompt, read_prompts
from deploy.verbs import online, serve
from proto import errors
from scheduler.simulate.trace import AccessTrace

_POLL_S = 0.05

OUT = typer.Argument(metavar="OUT.npz", help="Trace to write.", show_default=False)
MORE = typer.Argument(metavar="[PROMPTS]...", help="Further prompts.", show_default=False)
PROMPTS = typer.Option(
    metavar="DIR|FILE",
    help="A text is one prompt; a .jsonl has one a line; a folder, all of its .txt and .jsonl.",
)
MODEL = typer.Option(help="Store to start a stack of its own with. (default: the running stack)")
PROMPT_TOKENS = typer.Option(
    min=1, max=online.COUNT_MAX, help="A longer prompt is cut to this many tokens."
)
SEED = typer.Option(
    min=0, max=online.SEED_MAX, help="Of the first generation; the next has the next."
)
SCORES = typer.Option("--scores", help="Record the router's scores of all experts, too.")

# Waits until a condition holds, keeping alive what has to be.
Wait = Callable[[Callable[[], bool]], None]


def record(
    out: Annotated[Path, OUT],
    more: Annotated[list[Path] | None, MORE] = None,
    prompts: Annotated[list[Path] | None, PROMPTS] = None,
    max_tokens: Annotated[int, online.MAX_TOKENS] = 128,
    prompt_tokens: Annotated[int, PROMPT_TOKENS] = 64,
    temperature: Annotated[float, online.TEMPERATURE] = 0.8,
    top_p: Annotated[float, online.TOP_P] = 1.0,
    seed: Annotated[int, SEED] = 0,
    ignore_eos: Annotated[bool, online.IGNORE_EOS] = False,
    scores: Annotated[bool, SCORES] = False,
    run_dir: Annotated[Path | None, online.RUN_DIR] = None,
    model: Annotated[Path | None, MODEL] = None,
    memory: Annotated[str | None, online.MEMORY] = None,
    experts_memory: Annotated[str | None, online.EXPERTS_MEMORY] = None,
    config: Annotated[Path | None, online.CONFIG] = None,
) -> None:
    """Write which experts every decode step chose, one generation a prompt, as `flashmoe replay`
    reads it. Interrupted, it writes nothing.

    Example: flashmoe record trace.npz --prompts texts/ --max-tokens 256 --temperature 0.8 --seed 1
    """
    flags = {"model": model, "memory": memory, "experts_memory": experts_memory}
    wanted = read_prompts([*(prompts or ()), *(more or ())])
    drawing = Drawing(max_tokens, temperature, top_p, seed, ignore_eos, prompt_tokens)
    with publishing(out) as partial:
        trace = record_trace(
            out.stem, wanted, drawing, scores=scores, config=config, run_dir=run_dir, flags=flags
        )
        trace.save(partial)
    _summarise(out, trace)


def record_trace(
    name: str,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    *,
    config: Path | None,
    run_dir: Path | None,
    flags: Mapping[str, object],
    scores: bool = False,
) -> AccessTrace:
    """One generation a prompt, by the stack in `run_dir`, or by one of its own when flags name a
    model.

    Raises InvalidRequest, ConfigInvalid, Unavailable, KeyboardInterrupt when it is stopped, and
    what the node ends a generation with.
    """
    _check_flags(flags, run_dir)
    if not prompts:
        raise errors.InvalidRequest("there is nothing to generate from: give --prompts DIR|FILE")
    stopped = serve.stop_flag()
    with _node(config, run_dir, flags, stopped) as (node, wait):
        results = _generate(Recorder(node, drawing, scores), prompts, wait, stopped)
    left_out = sum(not result.steps for result in results)
    if left_out:
        console.err.print(f"{left_out} ended with their first token and were left out")
    return to_trace(name, prompts, results, drawing.as_text())


def _check_flags(flags: Mapping[str, object], run_dir: Path | None) -> None:
    if flags["model"] is not None:
        if run_dir is not None:
            raise errors.ConfigInvalid(
                "--model starts a stack of its own, --run-dir names one that runs: give one of them"
            )
        return
    for name in ("memory", "experts_memory"):
        if flags[name] is not None:
            flag = name.replace("_", "-")
            raise errors.ConfigInvalid(
                f"--{flag} is for a stack of its own: give --model STORE too, or leave it out"
            )


@contextmanager
def publishing(out: Path, remedy: str = "name a file in a folder that can") -> Iterator[Path]:
    """A file beside `out` to write; it takes the place of `out` when the block succeeds, and
    vanishes when not.

    Raises InvalidRequest at once when there can be none.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        partial.touch()
    except OSError as error:
        raise errors.InvalidRequest(
            f"{out} cannot be written ({error.strerror}): {remedy}"
        ) from error
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _node(
    config: Path | None,
    run_dir: Path | None,
    flags: Mapping[str, object],
    stopped: Callable[[], bool],
) -> Iterator[tuple[NodeClient, Wait]]:
    """A stack of its own when a model is named, else the one in the run directory. Raises
    Unavailable when none runs there.
    """
    if flags["model"] is not None:
        with (
            serve.own_stack(config, flags, stopped) as (stack, run),
            NodeClient(run.address("compute_node")) as node,
        ):
            yield node, stack.watch
        return
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    with online.connected(RunDir(settings.run_dir.resolve())) as node:
        yield node, _sleep_until


def _sleep_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_POLL_S)


def _generate(
    recorder: Recorder, prompts: Sequence[Prompt], wait: Wait, stopped: Callable[[], bool]
) -> list[Result]:
    """Raises KeyboardInterrupt when it was stopped."""

    def say(number: int, prompt: Prompt, result: Result) -> None:
        console.err.print(
            f"{number + 1}/{len(prompts)} {prompt.name}: {len(result.steps)} steps, "
            f"{result.tokens_per_s:.1f} tokens/s, hit ratio {result.decode.hit_ratio:.1%}",
        )

    with ThreadPoolExecutor(1) as threads:
        recording = threads.submit(recorder.run, prompts, say)
        try:
            wait(lambda: recording.done() or stopped())
        finally:
            recorder.cancel()  # does nothing to one that is through
    if stopped() and recording.exception():
        console.err.print("interrupted: nothing was written")
        raise KeyboardInterrupt
    return recording.result()


def _summarise(out: Path, trace: AccessTrace) -> None:
    console.out.print(
        f"{out}: {trace.num_generations} generations, {trace.num_steps} steps of "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top {trace.top_k}, "
        f"{console.size(out.stat().st_size)}",
    )
