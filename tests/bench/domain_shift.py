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
from matplotlib.axes import Axes
from numpy.typing import NDArray

from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Setting
from scheduler.simulate.trace import AccessTrace
from tests.bench.table import show

matplotlib.use("Agg")

NAMES = ("lru", "decayed", "river", "learned", "min")
COLOURS = {"decayed": "#d98c2b", "river": "#2b7fd9", "learned": "#1f9e6e"}
SPANS = {"100 steps before": (-100, 0), "0-25 after": (0, 25), "25-100 after": (25, 100)}
SMOOTHED_STEPS, FINE_STEPS = 96, 12
AROUND = (100, 150)

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
    """Above, the whole stream; below, the mean around a change."""
    from matplotlib import pyplot

    figure, (stream, change) = pyplot.subplots(
        2, 1, figsize=(12, 8.5), layout="constrained", height_ratios=(3, 2)
    )
    figure.suptitle(title)
    smooth = {name: _smooth(of_one, SMOOTHED_STEPS) for name, of_one in ratios.items()}
    _lines(stream, np.arange(len(smooth["lru"])) + SMOOTHED_STEPS - 1, smooth)
    bottom = stream.get_ylim()[0]
    for step, domain in at:
        stream.axvline(step, color="#555555", linewidth=0.6, linestyle=":")
        stream.text(step + 15, bottom + 0.3, domain, rotation=90, fontsize=8)
    stream.set(xlabel="decode step", ylabel=f"hit ratio %, mean of {SMOOTHED_STEPS} steps")
    stream.legend(loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.0))
    before, after = AROUND
    around = {
        name: _smooth(np.mean([of_one[s - before : s + after] for s, _ in at], axis=0), FINE_STEPS)
        for name, of_one in ratios.items()
    }
    _lines(change, np.arange(len(around["lru"])) + FINE_STEPS // 2 - before, around)
    change.axvline(0, color="#555555", linewidth=0.8, linestyle=":")
    change.set(
        xlabel=f"decode steps since the change, mean of {len(at)} changes",
        ylabel=f"hit ratio %, mean of {FINE_STEPS} steps",
    )
    figure.savefig(out, dpi=100)


def _smooth(of_one: Ratios, num_steps: int) -> Ratios:
    """Percent; means of so many steps."""
    return 100 * np.convolve(of_one, np.ones(num_steps) / num_steps, "valid")


def _lines(axes: Axes, steps: NDArray[np.int64], curves: Mapping[str, Ratios]) -> None:
    axes.fill_between(steps, curves["lru"], curves["min"], color="#ececec", label="LRU to MIN")
    for name, colour in COLOURS.items():
        axes.plot(steps, curves[name], color=colour, linewidth=1.4, label=name)
    axes.set_xlim(steps[0], steps[-1])
    axes.spines[["top", "right"]].set_visible(False)


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
