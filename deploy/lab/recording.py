"""Records an access trace: from the stack that runs, or from one of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Result
from deploy.lab.recorder import Recorder, Sampling, Wanted, to_trace
from deploy.settings import ServeSettings
from deploy.stack.connection import connected
from deploy.stack.launcher import own_stack
from deploy.stack.run_dir import RunDir
from deploy.terminal import console
from deploy.terminal.prompts import Prompt
from deploy.terminal.signals import Wait, stop_flag, work_until_stopped
from proto import errors
from scheduler.simulate.trace import AccessTrace

_POLL_S = 0.05


@dataclass(frozen=True)
class StackChoice:
    """The stack to record with: one of its own when `flags` name a model, else the one that runs in
    `run_dir`.

    flags:         as `ServeSettings.with_flags` takes them
    is_calibrated: one of its own uses what was calibrated for the store
    """

    config: Path | None
    run_dir: Path | None
    flags: Mapping[str, object]
    is_calibrated: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigInvalid for flags of a stack of its own without a model, and for both."""
        if self.flags["model"] is not None:
            if self.run_dir is not None:
                raise errors.ConfigInvalid(
                    "--model starts a stack of its own, --run-dir names one that runs: give one "
                    "of them"
                )
            return
        for name in ("memory", "experts_memory"):
            if self.flags[name] is not None:
                flag = name.replace("_", "-")
                raise errors.ConfigInvalid(
                    f"--{flag} is for a stack of its own: give --model STORE too, or leave it out"
                )

    @contextmanager
    def node(self, stopped: Callable[[], bool]) -> Iterator[tuple[NodeClient, Wait]]:
        """A client of the stack, and how to wait while it works. Raises Unavailable when no stack
        runs in the run directory.
        """
        if self.flags["model"] is not None:
            own = own_stack(self.config, self.flags, stopped, is_calibrated=self.is_calibrated)
            with (
                own as (stack, run),
                NodeClient(run.address("compute_node")) as node,
            ):
                yield node, stack.watch
            return
        settings = ServeSettings.load(self.config).with_flags(run_dir=self.run_dir)
        with connected(RunDir(settings.run_dir.resolve())) as node:
            yield node, _sleep_until


def record_trace(
    name: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    choice: StackChoice,
    wanted: Wanted = Wanted(),  # noqa: B008  frozen
    take: Callable[[Result], Result] = lambda result: result,
) -> AccessTrace:
    """Generate once from each prompt, and keep which experts every decode step used. wanted, take:
    see `Recorder`

    Raises InvalidRequest, ConfigInvalid, Unavailable, KeyboardInterrupt when the user stops it, and
    the error that the node ends a generation with.
    """
    if not prompts:
        raise errors.InvalidRequest("there is nothing to generate from: give --prompts DIR|FILE")
    stopped = stop_flag()
    with choice.node(stopped) as (node, wait):
        results = _generate(Recorder(node, sampling, wanted, take), prompts, wait, stopped)
    left_out = sum(not result.steps for result in results)
    if left_out:
        console.err.print(f"{left_out} ended with their first token and were left out")
    return to_trace(name, prompts, results, sampling.as_text())


def _sleep_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_POLL_S)


def _generate(
    recorder: Recorder, prompts: Sequence[Prompt], wait: Wait, stopped: Callable[[], bool]
) -> list[Result]:
    """Raises KeyboardInterrupt when the user stops it."""

    def say(number: int, prompt: Prompt, result: Result) -> None:
        console.err.print(
            f"{number + 1}/{len(prompts)} {prompt.name}: {len(result.steps)} steps, "
            f"{result.tokens_per_s:.1f} tokens/s, hit ratio {result.decode.hit_ratio:.1%}",
        )

    try:
        work = partial(recorder.run, prompts, say)
        return work_until_stopped(work, recorder.cancel, wait, stopped)
    except KeyboardInterrupt:
        console.err.print("interrupted: nothing was written")
        raise
