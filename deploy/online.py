"""Verbs around a running stack: serve, run, generate, status."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from compute_node.client import NodeClient
from compute_node.result import Generation, Phase, Result
from deploy import console, local
from deploy.budget import MemoryPlan, forecaster_room, plan_memory
from deploy.memory import MemoryReport
from deploy.offline import load_store
from deploy.run_dir import RunDir, RunState
from deploy.settings import ServeSettings, parse_bytes
from deploy.status import collect_status
from deploy.supervisor import Stack
from expert_store.manifest import Manifest
from proto import errors
from proto.redis_schema import PolicySetting
from proto.weight_format import EXACT

MODEL = typer.Option(help="Store made by `flashmoe index` or `pack`.")
MEMORY = typer.Option(help="Ceiling over everything, e.g. 2GiB.")
EXPERTS_MEMORY = typer.Option(help="For experts: bytes (1GiB), percent (37.5%) or slots (96).")
RUN_DIR = typer.Option(help="Sockets and state of the stack.  [default: ~/.flashmoe/run]")
REDIS = typer.Option(help="URL of a Redis or Valkey to use instead of the embedded one.")
CONFIG = typer.Option(help="Settings.  [default: ./flashmoe.toml if there is one]")
SOURCE = typer.Option(help="Where the checkpoint's files are now, if they moved.")
POLICY = typer.Option(help="What decides which expert to give up.  [default: auto]")
FORECASTER = typer.Option(help="What `flashmoe calibrate --out` wrote.  [default: the store's]")
MAX_TOKENS = typer.Option(help="New tokens at most.")
TEMPERATURE = typer.Option(help="0: greedy.")
TOP_P = typer.Option(help="Nucleus sampling; 1: off.")
SEED = typer.Option(help="Of the sampling; none: random.")
IGNORE_EOS = typer.Option("--ignore-eos", help="Go on past the end of text.")
JSON = typer.Option("--json", help="One JSON object instead of text.")


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
    with local.serving(settings, store_dir, manifest, plan, stopped, _say) as stack:
        if not stopped():
            console.out.print(
                f"ready: {model_name(manifest)}, {plan.slots} of {plan.num_experts} experts in "
                "memory, "
                f"ceiling {console.size(plan.ceiling_bytes)}, run dir {settings.run_dir}"
            )
        stack.watch(stopped)
    console.err.print("stopped")


def run(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
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
    stopped = stop_flag()
    flags = {"model": model, "memory": memory, "experts_memory": experts_memory}
    with own_stack(config, flags, stopped) as (stack, run), ThreadPoolExecutor(1) as threads:
        with NodeClient(run.address("compute_node")) as node:
            generation = node.generate(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                ignore_eos=ignore_eos,
            )
            writing = threads.submit(_write_all, prompt, generation)
            stack.watch(lambda: writing.done() or stopped())
            generation.cancel()  # does nothing to one that is through
            result = writing.result()
        stack.write_memory()
        report = MemoryReport.read(run.path)
    print_summary(result, report)


def _write_all(prompt: str, generation: Generation) -> Result:
    console.write(prompt)
    for piece in generation:
        console.write(piece.text)
    console.write("\n")
    return generation.run()


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    run_dir: Annotated[Path | None, RUN_DIR] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 128,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    top_p: Annotated[float, TOP_P] = 1.0,
    seed: Annotated[int | None, SEED] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeat for more.")] = None,
    ignore_eos: Annotated[bool, IGNORE_EOS] = False,
    timeout: Annotated[float | None, typer.Option(help="Deadline in seconds.")] = None,
    as_json: Annotated[bool, JSON] = False,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Stream text from a running stack.

    Example: flashmoe generate "Once upon a time" --max-tokens 64 --temperature 0.8 --seed 1
    """
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    with NodeClient(node_address(settings)) as node:
        generation = node.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            ignore_eos=ignore_eos,
            timeout_s=timeout,
        )
        for piece in generation:
            if not as_json:
                console.write(piece.text)
    result = generation.run()
    report = MemoryReport.read(settings.run_dir)
    if as_json:
        console.print_json(result_document(result, report))
    else:
        console.write("\n")
        print_summary(result, report)


def status(
    run_dir: Annotated[Path | None, RUN_DIR] = None,
    as_json: Annotated[bool, JSON] = False,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Health, hit ratio, residents and advice age of a running stack; exit 4 when a daemon is away.

    Example: flashmoe status --run-dir ~/.flashmoe/run
    """
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    found = collect_status(RunDir(settings.run_dir.resolve()))
    if as_json:
        console.print_json(found)
    else:
        for name, facts in found.items():
            rows = {key: str(value) for key, value in facts.items() if key != "nodes"}
            console.out.print(console.table(name, rows))
        for node, shadows in found["scheduler"].get("nodes", {}).items():
            console.out.print(console.table(f"policies of {node}", shadow_rows(shadows)))
    if any(facts["health"] != "SERVING" for facts in found.values() if "health" in facts):
        raise typer.Exit(console.UNAVAILABLE)


def shadow_rows(shadows: Mapping[str, Any]) -> dict[str, str]:
    """Who is in charge and why, then a line a policy, the best of the last steps first."""
    rows = {
        "in charge": f"{shadows['in_charge']}: {shadows['why']} ({shadows['switches']} switches)",
        "budget": f"{shadows['slots']} slots, scope {shadows['scope']}, {shadows['steps']} steps",
    }
    scores = shadows["policies"]
    for name in sorted(scores, key=lambda name: -scores[name]["windowed_hit_ratio"]):
        score = scores[name]
        rows[name] = (
            f"hit ratio {score['windowed_hit_ratio']:.4f} lately "
            f"({score['windowed_regret']:.4f} short of min), {score['hit_ratio']:.4f} in all"
        )
    return rows


def node_address(settings: ServeSettings) -> str:
    """Of the stack in the run directory. Raises Unavailable when none runs there."""
    run = RunDir(settings.run_dir.resolve())
    passing = {
        RunState.STARTING: "is starting: try again once `flashmoe serve` says that it is ready",
        RunState.STOPPING: "is stopping: start it again once it has stopped",
    }
    if (state := run.state()) in passing:
        raise errors.Unavailable(f"the stack in {run.path} {passing[state]}")
    if not run.socket("compute_node").exists():
        raise errors.Unavailable(
            f"no stack runs in {run.path}: start one with `flashmoe serve`, or name it with "
            "--run-dir"
        )
    return run.address("compute_node")


def prepare(settings: ServeSettings) -> tuple[Path, Manifest, MemoryPlan]:
    """Raises ConfigInvalid, ManifestInvalid, MemoryExceeded before anything is started."""
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
        console.err.print(f"starting {model_name(manifest)} ...")
        with local.serving(settings, store_dir, manifest, plan, stopped, _say) as stack:
            yield stack, RunDir(settings.run_dir.resolve())


def _say(line: str) -> None:
    """What goes on, on stderr."""
    console.err.print(line, markup=False)


def stop_flag() -> Callable[[], bool]:
    """True once SIGTERM, SIGINT or SIGHUP came."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    return lambda: bool(received)


def result_document(result: Result, report: MemoryReport | None) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_token_ids": result.prompt_token_ids,
        "finish_reason": result.finish_reason,
        "warnings": list(result.warnings),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
        "hit_ratio": _phases(result, lambda phase: phase.hit_ratio),
        "bytes_read": _phases(result, lambda phase: phase.bytes_read),
        "stall_s": _phases(result, lambda phase: phase.stall_s),
        "wall_s": _phases(result, lambda phase: phase.wall_s),
        "uncovered_s": _phases(result, lambda phase: phase.uncovered_s),
        "device_s": _phases(result, lambda phase: phase.device_s),
        "peak_memory_bytes": report.peak_bytes if report else None,
        "ceiling_bytes": report.ceiling_bytes if report else None,
        "memory_bytes_by_part": report.by_part if report else None,
        "cgroup_peak_bytes": report.cgroup_peak_bytes if report else None,
    }


def _limits(decode: Phase) -> str:
    """How near decode came to what its compute and its disk allow."""
    if not decode.wall_s or not decode.tokens:
        return "nothing was decoded"
    compute_s = decode.wall_s - decode.stall_s
    foreseeable = decode.wall_s / (compute_s + decode.uncovered_s)
    floor = max(compute_s, decode.device_s) / decode.wall_s
    return (
        f"{foreseeable:.2f} x compute and unforeseen misses, {floor:.2f} of the floor "
        f"({compute_s / decode.tokens * 1e3:.1f} ms compute, "
        f"{decode.device_s / decode.tokens * 1e3:.1f} ms disk a token)"
    )


def _phases(result: Result, value: Callable[[Phase], float]) -> dict[str, float]:
    return {"prefill": value(result.prefill), "decode": value(result.decode)}


def print_summary(result: Result, report: MemoryReport | None) -> None:
    decode = result.decode
    per_token = decode.bytes_read / decode.tokens if decode.tokens else 0.0
    share = decode.stall_s / decode.wall_s if decode.wall_s else 0.0
    rows = {
        "tokens/s": f"{result.tokens_per_s:.1f} ({len(result.token_ids)} tokens, "
        f"{result.finish_reason})",
        "time to first token": f"{result.ttft_s:.2f} s ({result.prefill.tokens} prompt tokens)",
        "hit ratio": f"{decode.hit_ratio:.3f} decode, {result.prefill.hit_ratio:.3f} prefill",
        "read per token": console.size(per_token),
        "stall share": f"{share:.1%} of decode waited for experts",
        "beside its limits": _limits(decode),
    }
    if report is not None:
        rows["peak memory"] = (
            f"{console.size(report.peak_bytes)} of {console.size(report.ceiling_bytes)}"
        )
    console.err.print(console.table("", rows))
    for warning in result.warnings:
        console.err.print(f"warning: {warning}", markup=False)
