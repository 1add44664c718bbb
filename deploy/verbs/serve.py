"""Verbs that start a stack: serve keeps it up, run generates once; and other verbs' own stacks."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from compute_node.client.result import Generation, Result
from deploy.plan.budget import MemoryPlan, forecaster_room, plan_memory
from deploy.report.summary import print_summary
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack import local
from deploy.stack.memory import MemoryReport
from deploy.stack.run_dir import RunDir
from deploy.stack.supervisor import Stack
from deploy.terminal import console
from deploy.terminal.prompts import choose_prompt
from deploy.verbs.offline import load_store
from deploy.verbs.online import (
    CONFIG,
    EXPERTS_MEMORY,
    FORECASTER,
    IGNORE_EOS,
    MAX_TOKENS,
    MEMORY,
    MODEL,
    POLICY,
    PROMPT,
    PROMPT_FILE,
    REDIS,
    RUN_DIR,
    SEED,
    SOURCE,
    TEMPERATURE,
    connected,
)
from expert_store.manifest.manifest import Manifest
from proto import errors
from proto.redis_schema import PolicySetting
from proto.weight_format import EXACT


def serve(
    model: Annotated[Path | None, MODEL] = None,
    memory: Annotated[str | None, MEMORY] = None,
    experts_memory: Annotated[str | None, EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, RUN_DIR] = None,
    redis: Annotated[str | None, REDIS] = None,
    source: Annotated[Path | None, SOURCE] = None,
    policy: Annotated[PolicySetting | None, POLICY] = None,
    forecaster: Annotated[Path | None, FORECASTER] = None,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Run all daemons on this box until interrupted; prints one line when ready.

    Example: flashmoe serve --model ~/stores/olmoe --memory 4GiB
    """
    settings = ServeSettings.load(config).with_flags(
        model=model,
        memory=memory,
        experts_memory=experts_memory,
        run_dir=run_dir,
        redis=redis,
        source=source,
        policy=policy,
    )
    if forecaster is not None:
        settings = settings.with_forecaster(forecaster)
    store_dir, manifest, plan = prepare(settings)
    stopped = stop_flag()
    with local.serving(settings, store_dir, manifest, plan, stopped, say=console.say) as stack:
        if not stopped():
            console.out.print(
                f"ready: {model_name(manifest)}, {plan.slots} of {plan.num_experts} experts in "
                f"memory, ceiling {console.size(plan.ceiling_bytes)}, run dir {settings.run_dir}",
            )
        stack.watch(stopped)
    console.say("stopped")


def run(
    prompt: Annotated[str | None, PROMPT] = None,
    prompt_file: Annotated[Path | None, PROMPT_FILE] = None,
    model: Annotated[Path | None, MODEL] = None,
    memory: Annotated[str | None, MEMORY] = None,
    experts_memory: Annotated[str | None, EXPERTS_MEMORY] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 128,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    seed: Annotated[int | None, SEED] = None,
    ignore_eos: Annotated[bool, IGNORE_EOS] = False,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Start a stack of its own, generate once, print a summary, stop.

    Example: flashmoe run "Once upon a time" --model ~/stores/olmoe --memory 4GiB
    """
    text = choose_prompt(prompt, prompt_file)
    stopped = stop_flag()
    flags = {"model": model, "memory": memory, "experts_memory": experts_memory}
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


def prepare(settings: ServeSettings) -> tuple[Path, Manifest, MemoryPlan]:
    """Warns of what the plan warns of. Raises ConfigInvalid, ManifestInvalid, MemoryExceeded
    before anything is started.
    """
    if settings.model is None:
        raise errors.ConfigInvalid("give --model STORE, or model in the [serve] table")
    manifest = load_store(settings.model)
    plan = plan_memory(
        manifest,
        parse_bytes(settings.memory, "--memory") if settings.memory else None,
        settings.experts_memory,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.chunk_tokens(manifest.sizing),
        spare_slots=settings.spare_slots(manifest.slot_bytes),
        embedded_valkey=settings.redis is None,
        forecaster_bytes=forecaster_room(settings.forecaster(settings.model)),
    )
    for warning in plan.warnings:
        console.say(f"warning: {warning}")
    return settings.model, manifest, plan


def model_name(manifest: Manifest) -> str:
    """With how its weights are kept, where they are not the checkpoint's own bytes."""
    spec = manifest.spec
    exact = spec.weight_format == EXACT
    return spec.model_type if exact else f"{spec.model_type} in {spec.weight_format}"


@contextmanager
def own_stack(
    config: Path | None, flags: Mapping[str, Any], stopped: Callable[[], bool]
) -> Iterator[tuple[Stack, RunDir]]:
    """A stack in a scratch run directory, for the block. flags: as `with_flags` takes them.

    Raises as `prepare` and `local.serving` do.
    """
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as scratch:
        settings = ServeSettings.load(config).with_flags(**flags, run_dir=Path(scratch))
        store_dir, manifest, plan = prepare(settings)
        console.say(f"starting {model_name(manifest)} ...")
        with local.serving(settings, store_dir, manifest, plan, stopped, say=console.say) as stack:
            yield stack, RunDir(settings.run_dir.resolve())


def stop_flag() -> Callable[[], bool]:
    """True once SIGTERM, SIGINT or SIGHUP came. A hang-up that was ignored at the start, as by
    nohup, stays ignored.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        signal.signal(number, lambda number, frame: received.append(number))
    return lambda: bool(received)
