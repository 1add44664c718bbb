"""The verb that replays a trace: what would each eviction policy have missed?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deploy.terminal import console
from proto import errors
from proto.redis_schema import LAYER

if TYPE_CHECKING:
    from scheduler.lab.policies import Background
    from scheduler.simulate.replay import Outcome, Setting

FRAME = {"lru": "lru, the floor", "min": "min, the optimum"}

TRACE = typer.Argument(metavar="TRACE.npz", help="Written by `flashmoe record`.")
SLOTS = typer.Option(help="Experts that fit, a layer.")
SCOPE = typer.Option(
    metavar="layer|pool", help="Slots for each layer, or one pool of as many times the layers."
)
NAMES = typer.Option(
    "--policies", metavar="NAME,...", help="lru,decayed,min for example. (default: all)"
)
TRAIN = typer.Option(
    metavar="TRACE2.npz", help="What policies may learn from before: not the trace replayed."
)
WARMUP = typer.Option(help="First steps, replayed and not counted.")
LAG = typer.Option(metavar="0|1", help="How many steps old the advice of learned policies is.")
HALF_LIFE = typer.Option(
    metavar="TOKENS", help="Of what decays: the policies decayed and importance."
)
PREDICT = typer.Option(
    "--predict",
    help="What predictors would have foreseen of the misses, instead; under one policy.",
)
AS_JSON = typer.Option("--json", help="One JSON object.")
PICTURE = typer.Option(
    "--plot", metavar="OUT.png", help="Draw hit ratio over cache size; replays further sizes."
)


def replay(
    trace: Annotated[Path, TRACE],
    slots: Annotated[int, SLOTS],
    scope: Annotated[str, SCOPE] = LAYER,
    policies: Annotated[str | None, NAMES] = None,
    train: Annotated[Path | None, TRAIN] = None,
    warmup: Annotated[int, WARMUP] = 500,
    lag: Annotated[int, LAG] = 0,
    half_life: Annotated[float, HALF_LIFE] = 16.0,
    predict: Annotated[bool, PREDICT] = False,
    as_json: Annotated[bool, AS_JSON] = False,
    picture: Annotated[Path | None, PICTURE] = None,
) -> None:
    """Tell what each eviction policy would have missed on a recorded trace.

    One layer of one step is one event, its experts pinned; generations follow one another in a
    warm cache. lru and min, the optimum, frame the others: gap closed is 0 for one and 1 for the
    other.

    --predict: recall and precision of misses by predictor and layers ahead, of a trace that was
    recorded with --predictions, in a cache of these slots under decayed or the policy named.

    Example: flashmoe replay trace.npz --slots 12 --train other.npz --plot hits.png
    """
    # River and its kind take seconds to import, and memory that other verbs count.
    from deploy.lab import plot
    from deploy.lab.policy_replay import (
        PolicyReplay,
        chosen_policies,
        plotted_sizes,
        training_trace,
    )
    from scheduler.lab.policies import Background
    from scheduler.simulate.replay import Setting, as_document
    from scheduler.simulate.trace import AccessTrace

    if predict and picture is not None:
        raise errors.InvalidRequest("--plot draws hit ratios, not what --predict finds: give one")
    if picture is not None:
        plot.check_writable(picture)
    names = chosen_policies(policies)
    loaded = AccessTrace.load(trace, predictions=predict)
    setting = Setting(loaded, slots, scope, warmup, lag, half_life)
    background = Background(training_trace(train, trace, setting.trace) if train else None)
    if predict:
        _predict(setting, policies or "decayed", background, as_json)
        return
    replayed = PolicyReplay(names, background, is_choice=policies is not None)
    outcomes = replayed.run(setting)
    if picture is not None:
        sizes = plotted_sizes(setting)
        plot.draw(
            picture, setting, {**replayed.run_sizes(setting, sizes, outcomes), slots: outcomes}
        )
        console.err.print(f"{picture}: {len(sizes) + 1} cache sizes")
    if as_json:
        console.print_json(as_document(setting, outcomes))
    else:
        _print(setting, train, outcomes)


def _predict(setting: Setting, policy: str, background: Background, as_json: bool) -> None:
    from deploy.lab.predictor_replay import replay_predictors

    found = replay_predictors(setting, policy, background)
    trace = setting.trace
    if as_json:
        console.print_json(
            {
                "trace": trace.name,
                "slots": setting.slots,
                "scope": setting.scope,
                "policy": policy,
                "warmup_steps": setting.warmup_steps,
                "predictors": [each.as_document() for each in found],
            }
        )
        return
    title = (
        f"{trace.name}: {trace.num_steps - setting.warmup_steps:,} steps counted of "
        f"{trace.num_steps:,}, {setting.slots} of {trace.num_experts} slots a layer"
        f"{', in one pool' if setting.scope != LAYER else ''} under {policy}"
        f"{f', trained on {background.train.name}' if background.train else ''}\n"
        "recall / precision of misses; corrected: what a predictor was lately wrong by is added"
    )
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    grid.add_column("predictor")
    for heading in ("ahead", "layers", "as said", "corrected"):
        grid.add_column(heading, justify="right")
    plain, corrected = found[: len(found) // 2], found[len(found) // 2 :]
    for one, other in zip(plain, corrected, strict=True):
        grid.add_row(
            one.predictor,
            str(one.layers_ahead),
            str(one.num_layers),
            *(f"{each.recall:.3f} / {each.precision:.3f}" for each in (one, other)),
        )
    console.out.print(grid)


def _print(setting: Setting, train: Path | None, outcomes: Mapping[str, Outcome]) -> None:
    from scheduler.simulate.replay import gap_closed

    trace = setting.trace
    counted = trace.num_steps - setting.warmup_steps
    title = (
        f"{trace.name}: {counted:,} steps counted of {trace.num_steps:,}, {trace.num_layers} "
        f"layers, top {trace.top_k} of {trace.num_experts} experts\n{setting.slots} slots a layer"
        f"{', in one pool' if setting.scope != LAYER else ''}, "
        f"{f'trained on {train.name}' if train else 'nothing known before'}"
        f"{', advice a step old' if setting.lag_steps else ''}"
    )
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    grid.add_column("policy")
    for heading in ("hit ratio", "misses", "gap closed", "us/step"):
        grid.add_column(heading, justify="right")
    for name, outcome in sorted(outcomes.items(), key=lambda item: item[1].misses):
        gap = gap_closed(outcome, outcomes["lru"], outcomes["min"])
        grid.add_row(
            FRAME.get(name, name),
            f"{outcome.hit_ratio:.2%}",
            f"{outcome.misses:,}",
            "-" if gap is None else f"{gap:.3f}",
            f"{outcome.us_per_step:,.0f}",
            style="bold" if name in FRAME else None,
        )
    console.out.print(grid)
