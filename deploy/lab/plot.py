"""Draws hit ratio over cache size: every policy between LRU and the optimum."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from proto import errors
from proto.redis_schema import LAYER
from scheduler.simulate.replay import Outcome, Setting, gap_closed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By slots a layer, then by policy.
Sizes = Mapping[int, Mapping[str, Outcome]]
Curve = tuple[list[int], list[float]]  # slots a layer, value

LRU, MIN = "lru", "min"
SUFFIXES = (".png", ".svg", ".pdf")
FRAME_COLOUR, SHADE = "#39424e", "#e9edf2"
# Strong colours for what learns, muted ones for fixed rules.
COLOURS = {
    "learned": "#d1495b",
    "hedged": "#1f6feb",
    "river": "#128a5b",
    "flashmoe": "#8e44ad",
    "decayed": "#e08e0b",
    "lfru": "#3aa6b9",
    "s3fifo": "#8c6d31",
    "lecar": "#7c8a99",
    "arc": "#b08ea2",
    "lfu": "#9aa832",
}
LEARNS = ("learned", "hedged", "river", "flashmoe")
WORST_GAP = -0.35  # below this the axis ends
LABEL_STEP = 0.042  # of an axis' height: labels closer than this would overlap


def check_writable(path: Path) -> None:
    """Check the name before minutes are spent. Raises InvalidRequest."""
    if path.suffix.lower() not in SUFFIXES:
        raise errors.InvalidRequest(f"{path} is no picture: give --plot a name that ends in .png")
    if not path.parent.is_dir():
        raise errors.InvalidRequest(f"{path.parent} is no folder: make it, or give another --plot")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise errors.InvalidRequest(f"{path} cannot be written: give another --plot")


def draw(path: Path, setting: Setting, sizes: Sizes) -> None:
    """Two panels: hit ratio, and how much of the gap between LRU and MIN each policy closes.

    Raises OSError when the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(13, 5.8), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(_title(setting), x=0.012, ha="left", fontsize=12.5)
    left, right = figure.subplots(1, 2)
    _draw_hits(left, setting, sizes)
    _draw_gaps(right, setting, sizes)
    for axes in (left, right):
        _finish(axes, setting, sizes)
    figure.savefig(path)


def _title(setting: Setting) -> str:
    trace = setting.trace
    scope = "per-layer slots" if setting.scope == LAYER else "one pool for all layers"
    counted = trace.num_steps - setting.warmup_steps
    return (
        f"{trace.name}: {trace.num_layers} layers, top {trace.top_k} of {trace.num_experts} "
        f"experts, {scope}, {counted:,} decode steps"
    )


def _draw_hits(axes: Axes, setting: Setting, sizes: Sizes) -> None:
    axes.set_title("Hit ratio, %", loc="left")
    curves = {name: _hit_curve(sizes, name) for name in _names(sizes)}
    slots, lru, optimum = curves[LRU][0], curves[LRU][1], curves[MIN][1]
    axes.fill_between(slots, lru, optimum, color=SHADE, zorder=0)
    _draw_curves(axes, curves)
    axes.set_ylim(min(lru) - 3, 100.5)
    at_slots = sizes[setting.slots]
    best = min((name for name in curves if name != MIN), key=lambda name: at_slots[name].misses)
    texts = {name: f"{_shown(name)} {at_slots[name].hit_ratio:.1%}" for name in (LRU, MIN, best)}
    _label(axes, curves, texts)


def _draw_gaps(axes: Axes, setting: Setting, sizes: Sizes) -> None:
    axes.set_title("Share of the gap from LRU to the optimum that is closed", loc="left")
    by_name = {name: _gap_curve(sizes, name) for name in _names(sizes)}
    curves = {name: curve for name, curve in by_name.items() if curve[0]}
    axes.axhspan(0, 1, color=SHADE, zorder=0)
    _draw_curves(axes, curves)
    lowest = min((value for _, values in curves.values() for value in values), default=0.0)
    axes.set_ylim(max(WORST_GAP, lowest - 0.05), 1.05)
    texts = {}
    for name, (slots, values) in curves.items():
        at_slots = dict(zip(slots, values, strict=True)).get(setting.slots)
        value = "" if at_slots is None or name in (LRU, MIN) else f" {at_slots:.2f}"
        texts[name] = _shown(name) + value
    _label(axes, curves, texts)


def _names(sizes: Sizes) -> list[str]:
    """In every size, drawn in this order: the frame first, then what learns on top."""
    names = [
        name for name in next(iter(sizes.values())) if all(name in at for at in sizes.values())
    ]
    return sorted(names, key=lambda name: (name not in (LRU, MIN), name in LEARNS))


def _hit_curve(sizes: Sizes, name: str) -> Curve:
    slots = sorted(sizes)
    return slots, [100 * sizes[at][name].hit_ratio for at in slots]


def _gap_curve(sizes: Sizes, name: str) -> Curve:
    """Without sizes at which LRU is the optimum."""
    gaps = {at: gap_closed(sizes[at][name], sizes[at][LRU], sizes[at][MIN]) for at in sorted(sizes)}
    known = {at: gap for at, gap in gaps.items() if gap is not None}
    return list(known), list(known.values())


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for name, (slots, values) in curves.items():
        learns, frames = name in LEARNS, name in (LRU, MIN)
        axes.plot(
            slots,
            values,
            color=_colour(name),
            linewidth=2.2 if learns or frames else 1.2,
            linestyle="--" if frames else "-",
            marker=None if frames else "o",
            markersize=4.5 if learns else 3,
        )


def _label(axes: Axes, curves: Mapping[str, Curve], texts: Mapping[str, str]) -> None:
    """Beside the end of each curve, apart from one another."""
    low, high = axes.get_ylim()
    ends = {name: (curves[name][0][-1], max(low, curves[name][1][-1])) for name in texts}
    heights = _apart({name: (value - low) / (high - low) for name, (_, value) in ends.items()})
    for name, text in texts.items():
        axes.annotate(
            text,
            xy=ends[name],
            xytext=(1.03, heights[name]),
            textcoords="axes fraction",
            color=_colour(name),
            fontsize=10,
            fontweight="bold" if name in LEARNS or name in (LRU, MIN) else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": _colour(name),
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """Shares of the axis' height, each as near to its own as it gets with LABEL_STEP between any
    two: neighbours that are too close become a block around their mean.
    """
    names = sorted(heights, key=lambda name: heights[name])
    blocks: list[list[float]] = []  # of wanted heights, each lowered by its place in the order
    for place, name in enumerate(names):
        blocks.append([heights[name] - place * LABEL_STEP])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    lowered = [fmean(block) for block in blocks for _ in block]
    return {
        name: height + place * LABEL_STEP
        for place, (name, height) in enumerate(zip(names, lowered, strict=True))
    }


def _shown(name: str) -> str:
    return {LRU: "LRU", MIN: "optimum"}.get(name, name)


def _finish(axes: Axes, setting: Setting, sizes: Sizes) -> None:
    axes.set_xlabel(f"slots a layer; numbers beside the curves are at {setting.slots}")
    axes.set_xticks(sorted(sizes))
    axes.grid(axis="y", color="#d5dbe1", linewidth=0.6)
    axes.axvline(setting.slots, color=FRAME_COLOUR, linewidth=0.8, linestyle=":", zorder=1)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    return COLOURS.get(name, FRAME_COLOUR)
