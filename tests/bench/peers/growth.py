"""How cost grows: tokens/s over the number of experts, and over their size, under one ceiling."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.peers import compare
from tests.bench.peers.laboratory import Laboratory, present_commit, read_prompts
from tests.bench.peers.models import GGUF, LOSSLESS, PeerModel
from tests.bench.peers.plan import READ_AHEAD_BYTES
from tests.bench.peers.report import speed
from tests.bench.peers.run import Case, RunResult
from tests.bench.table import show, spread
from tests.bench.widen import MIB
from tests.stack import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT_BYTES = 2304 * MIB  # 37.5 % of 6 GiB
NARROW_EXPERTS = 32  # a layer, of the shipped model
RECORD_BYTES = 3 * MIB
COPIES = (1, 2, 4, 8)
RECORDS_MIB = (3, 6, 12, 24)
ENGINES = {"FlashMoE lossless": "#d1495b", "llama.cpp": "#1f6feb"}
PROMPT_TOKENS, MAX_TOKENS, NUM_PROMPTS = 48, 32, 6
ROUNDS = 3
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200)
PLOT = ROOT / "tests/bench/plots/growth.png"

Speeds = dict[str, list[float]]  # by engine, a figure a round


@dataclass(frozen=True)
class Series:
    """One panel. points: what x is -> the model there."""

    title: str
    x_label: str
    points: dict[float, PeerModel]


def series() -> list[Series]:
    formats = (GGUF, LOSSLESS)
    return [
        Series(
            f"experts of {RECORD_BYTES // MIB} MiB, top 4: the same compute a token",
            "experts a layer",
            {NARROW_EXPERTS * n: PeerModel(RECORD_BYTES, n, formats) for n in COPIES},
        ),
        Series(
            f"{NARROW_EXPERTS} experts a layer, top 4, growing",
            "model size, GiB",
            {
                size * 8 * NARROW_EXPERTS / 1024: PeerModel(size * MIB, 1, formats)
                for size in RECORDS_MIB
            },
        ),
    ]


def grow(chosen: argparse.Namespace) -> None:
    """Measures each model on a disk of its own, prints a table and draws it."""
    rounds = 1 if chosen.quick else min(ROUNDS, chosen.rounds)
    found: list[tuple[Series, dict[float, Speeds]]] = []
    measured: dict[PeerModel, Speeds] = {}
    for one in series():
        for model in one.points.values():
            if model not in measured:
                measured[model] = _measure(model, chosen, rounds)
        found.append((one, {x: measured[model] for x, model in one.points.items()}))
    for one, speeds in found:
        _table(one, speeds, rounds)
    draw(PLOT, found, present_commit())
    print(f"drawn: {PLOT}\n")


def _measure(model: PeerModel, chosen: argparse.Namespace, rounds: int) -> Speeds:
    name = f"growth-{model.record_bytes // MIB}-{model.copies}"
    is_compared = (model.record_bytes, model.copies) == (compare.RECORD_BYTES, 1)
    disk_name = compare.NAME if is_compared else None
    laboratory = Laboratory(name, model, chosen.python, present_commit(), disk_name)
    if chosen.fresh:
        laboratory.forget()
    wanted = [
        Case(engine, None, LIMIT_BYTES, READ_AHEAD_BYTES, NUM_PROMPTS, MAX_TOKENS, number)
        for number in range(rounds)
        for engine in ENGINES
    ]
    if laboratory.missing(wanted):
        laboratory.prepare()
    runs = laboratory.run(wanted, read_prompts(PROMPT_TOKENS))
    if not is_compared:
        laboratory.discard()
    return {engine: _speeds(runs, engine) for engine in ENGINES}


def _speeds(runs: Sequence[RunResult], engine: str) -> list[float]:
    """Raises OSError when one failed."""
    for run in runs:
        if run.failure:
            raise OSError(f"{run.case.engine}: {run.failure}")
    return [speed(run.answers[1:]) for run in runs if run.case.engine == engine]


def _table(one: Series, speeds: Mapping[float, Speeds], rounds: int) -> None:
    show(
        f"tokens/s within {LIMIT_BYTES // MIB} MiB, {one.title}, {rounds} rounds, median (min-max)",
        [one.x_label, *ENGINES],
        [
            [f"{x:g}", *(spread(of_one[engine], 2) for engine in ENGINES)]
            for x, of_one in speeds.items()
        ],
    )


def draw(path: Path, found: Sequence[tuple[Series, Mapping[float, Speeds]]], commit: str) -> None:
    """A panel a series; bars from the slowest to the fastest round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (one, speeds) in zip(panels, found, strict=True):
        _panel(axes, one, speeds)
    panels[0].set_ylabel("tokens/s, decode")
    figure.suptitle(
        f"All processes of an engine within {LIMIT_BYTES / 1024 / MIB:g} GiB ({commit})"
    )
    figure.savefig(path)


def _panel(axes: Axes, one: Series, speeds: Mapping[float, Speeds]) -> None:
    places = range(len(speeds))
    for engine, colour in ENGINES.items():
        of_engine = [sorted(of_one[engine]) for of_one in speeds.values()]
        middle = [rounds[len(rounds) // 2] for rounds in of_engine]
        below = [m - rounds[0] for m, rounds in zip(middle, of_engine, strict=True)]
        above = [rounds[-1] - m for m, rounds in zip(middle, of_engine, strict=True)]
        axes.errorbar(
            places, middle, (below, above), color=colour, marker="o", capsize=3, label=engine
        )
    axes.set_xticks(list(places), [f"{x:g}" for x in speeds])
    axes.set_yscale("log")
    axes.set_yticks(SPEEDS, [str(speed) for speed in SPEEDS])
    axes.minorticks_off()
    axes.set(title=one.title, xlabel=one.x_label)
    axes.grid(axis="y", which="both", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
