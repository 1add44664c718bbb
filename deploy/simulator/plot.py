"""Draws tokens/s over the number of boxes, and over the energy of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.simulator.decoding import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, Outcome]]  # number of boxes, or factor of joules


def draw(path: Path, title: str, curves: Mapping[str, Curve], *, trades: bool) -> None:
    """curves: by model. trades: over joules a token, a point a factor; else over boxes

    Raises OSError when the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_ylabel("tokens/s")
    for name, curve in curves.items():
        (_draw_trade if trades else _draw_counts)(axes, name, curve)
    if not trades:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("joules a token" if trades else "boxes")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _draw_counts(axes: Axes, name: str, curve: Curve) -> None:
    xs, outcomes = zip(*curve, strict=True)
    axes.plot(xs, [one.tokens_per_s for one in outcomes], marker="o", label=name)


def _draw_trade(axes: Axes, name: str, curve: Curve) -> None:
    points = [(one.joules, one.tokens_per_s) for _, one in curve]
    axes.plot(*zip(*points, strict=True), marker="o", label=name)
    for (factor, _), point in zip(curve, points, strict=True):
        axes.annotate(f"x {factor:g}", point, textcoords="offset points", xytext=(6, 4), fontsize=8)
