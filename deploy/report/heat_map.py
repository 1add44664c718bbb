"""The heat map of experts in characters: a row a layer, a mark an expert, folded to what fits."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from compute_node.live.figures import HeatRow

# Digits of proto/compute_node.proto's ExpertState; of several under one mark, the first shows.
_SHOWN = "32410"
_MARKS = {
    "0": ("·", "dim"),
    "1": ("▪", "blue"),
    "2": ("█", "bold green"),
    "3": ("↓", "bold yellow"),
    "4": ("?", "magenta"),
}
_NAMES = {"2": "used now", "1": "in memory", "3": "being read", "4": "foreseen", "0": "on disk"}
_LABEL_CELLS, _LEGEND_LINES = 4, 2  # the legend breaks on a narrow terminal


def heat_map(rows: Sequence[HeatRow], width: int, height: int) -> Text:
    """At most `height` lines, the legend included, or one and the legend."""
    across = -(-len(rows[0].states) // max(1, width - _LABEL_CELLS))
    down = -(-len(rows) // max(1, height - _LEGEND_LINES))
    text = _legend(down, across)
    for start in range(0, len(rows), down):
        group = rows[start : start + down]
        text.append(f"\n{group[0].layer:>{_LABEL_CELLS - 1}} ", "dim")
        for digit in _folded(group, across):
            text.append(*_MARKS[digit])
    return text


def _folded(group: Sequence[HeatRow], across: int) -> str:
    """One digit for each `across` experts of the group's layers."""
    length = len(group[0].states)
    return "".join(
        _liveliest("".join(row.states[start : start + across] for row in group))
        for start in range(0, length, across)
    )


def _liveliest(states: str) -> str:
    return next(digit for digit in _SHOWN if digit in states)


def _legend(down: int, across: int) -> Text:
    text = Text("layer x expert:")
    for digit, name in _NAMES.items():
        text.append("  ").append(*_MARKS[digit]).append(f" {name}")
    if down * across > 1:
        text.append(f"; a mark is {down} x {across}", "dim")
    return text
