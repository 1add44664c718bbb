"""Draws tokens per second over perplexity: every setting that was measured, and the frontier."""

from __future__ import annotations

from pathlib import Path

from proto.quality import QualityCard, Setting

_FRONTIER, _OTHER = "#1f6feb", "#9aa5b1"


def draw(path: Path, card: QualityCard, title: str) -> None:
    """Raises OSError when the picture cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    axes = figure.subplots()
    frontier = card.frontier
    others = [setting for setting in card.settings if setting not in frontier]
    for settings, colour, line in ((others, _OTHER, ""), (frontier, _FRONTIER, "-")):
        axes.errorbar(
            [_percent(setting.perplexity) for setting in settings],
            [setting.tokens_per_s for setting in settings],
            xerr=_errors(settings),
            color=colour,
            ecolor=colour + "66",
            marker="o",
            linestyle=line or "none",
            markersize=4,
            elinewidth=0.8,
        )
    for setting in frontier:
        axes.annotate(
            setting.route or "exact",
            (_percent(setting.perplexity), setting.tokens_per_s),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8.5,
        )
    axes.set_xlabel("perplexity above exact, % (bars: two standard errors)")
    axes.set_ylabel("tokens a second")
    axes.grid(color="#d5dbe1", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg")


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _errors(settings: list[Setting] | tuple[Setting, ...]) -> list[list[float]]:
    return [
        [100 * (setting.perplexity - setting.perplexity_low) for setting in settings],
        [100 * (setting.perplexity_high - setting.perplexity) for setting in settings],
    ]
