"""How the hit ratio falls when the text changes its domain, and how soon it recovers.

    python -m tests.bench.domain_shift TEST.npz --train TRAIN.npz --plot shift.png

The testing trace has one domain after another (seq_names); `make policies` records it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from scheduler.policies import POLICIES, Background
from scheduler.replay import Setting
from scheduler.trace import AccessTrace
from tests.bench.table import show

matplotlib.use("Agg")

NAMES = ("lru", "decayed", "river", "learned", "min")
COLOURS = ("#9a9a9a", "#d98c2b", "#2b7fd9", "#1f9e6e", "#9a9a9a")
SPANS = {"100 steps before": (-100, 0), "0-25 after": (0, 25), "25-100 after": (25, 100)}
SMOOTHED_STEPS = 96

Ratios = NDArray[np.float64]


def hit_ratios(setting: Setting, background: Background, name: str) -> Ratios:
    """[T], of every step."""
    cache = POLICIES[name](setting, background)
    return np.array([cache.step(event).mean() for event in setting.trace.events()])


def shifts(trace: AccessTrace, warmup_steps: int) -> list[tuple[int, str]]:
    """Steps at which another domain begins, and its name; those within the warm-up left out."""
    names = trace.seq_names
    begins = [
        (int(trace.seq_offsets[number]), names[number])
        for number in range(1, len(names))
        if names[number] != names[number - 1]
    ]
    return [begin for begin in begins if begin[0] >= warmup_steps]


def table(ratios: Mapping[str, Ratios], at: Sequence[int]) -> None:
    rows = []
    for name, of_one in ratios.items():
        means = [
            np.mean([of_one[step + start : step + end].mean() for step in at])
            for start, end in SPANS.values()
        ]
        fall = means[0] - means[1]
        rows.append([name, *(f"{100 * mean:.1f}" for mean in means), f"{100 * fall:.1f}"])
    show(f"Hit ratio % around {len(at)} changes of domain", ["policy", *SPANS, "fall"], rows)


def draw(out: Path, title: str, ratios: Mapping[str, Ratios], at: list[tuple[int, str]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 5), layout="constrained")
    kernel = np.ones(SMOOTHED_STEPS) / SMOOTHED_STEPS
    smooth = {name: 100 * np.convolve(of_one, kernel, "valid") for name, of_one in ratios.items()}
    steps = np.arange(len(smooth["lru"])) + SMOOTHED_STEPS - 1  # the mean of the steps up to here
    axes.fill_between(steps, smooth["lru"], smooth["min"], color="#f0f0f0", label="LRU to MIN")
    for name, colour in zip(NAMES, COLOURS, strict=True):
        if name not in ("lru", "min"):
            axes.plot(steps, smooth[name], color=colour, linewidth=1.3, label=name)
    bottom, top = axes.get_ylim()
    for step, domain in at:
        axes.axvline(step, color="#555555", linewidth=0.6, linestyle=":")
        axes.text(step + 15, bottom + 0.02 * (top - bottom), domain, rotation=90, fontsize=8)
    axes.set(
        title=title, xlabel="decode step", ylabel=f"hit ratio %, mean of {SMOOTHED_STEPS} steps"
    )
    axes.set_xlim(steps[0], steps[-1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", ncols=4, frameon=False, bbox_to_anchor=(1, 1.0))
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=12)
    parser.add_argument("--scope", default="pool")
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    trace = AccessTrace.load(given.trace)
    setting = Setting(trace, given.slots, given.scope, given.warmup, given.lag)
    background = Background(AccessTrace.load(given.train))
    ratios = {name: hit_ratios(setting, background, name) for name in NAMES}
    at = shifts(trace, given.warmup)
    table(ratios, [step for step, _ in at])
    if given.plot:
        size = f"{given.slots} slots a layer{' in one pool' if given.scope == 'pool' else ''}"
        draw(given.plot, f"Changes of domain: {trace.name}, {size}", ratios, at)


if __name__ == "__main__":
    main()
