"""One frame of `flashmoe top`: it fits the terminal, and says what is away.

Planted faults seen red: a mark of several experts shows the first of them, the map is wider than
the terminal, a daemon that is away is not named.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from compute_node.live.figures import (
    Clients,
    Disk,
    Experts,
    Figures,
    Guarded,
    HeatRow,
    Memory,
    Policies,
    Policy,
    Speed,
    Spread,
)
from deploy.report.heat_map import heat_map
from deploy.report.top_page import duration, frame

SPREAD = Spread(0.031, 0.045, 100)
FULL = Figures(
    at_s=0.0,
    away={},
    speed=Speed(32.44, 410.0, Spread(0.21, 1.5, 3), SPREAD, SPREAD),
    clients=Clients(3, 1, 40, 1, 2, 2, 5, 4100),
    experts=Experts(0.913, 0.94, 96, 96),
    disk=Disk(220e6, 0.31, Spread(0.0004, 0.003, 9), 0),
    memory=Memory(1 << 30, 812 << 20, 900 << 20, {"expert slots": 300 << 20}, 0.1),
    policies=Policies(
        "node0",
        "lfu",
        "led lru of late, by 2.10 points in 80 steps, at step 120",
        (
            Policy("min", "optimum (MIN)", 0.95, None),
            Policy("lfu", "least frequently used", 0.9, 0.05),
        ),
    ),
    guards=(Guarded("1%", "prior .05", 12, 0.002, 0.004, 0.0099, 0.99, 1, 0),),
    stalls={"for the store's answer": 0.12},
    heat=tuple(HeatRow(layer, "0123" * 32) for layer in range(48)),
)


def lines(figures: Figures, width: int, height: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(frame(figures, console, height))
    return captured.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(60, 40), (100, 50), (200, 200)])
def test_a_frame_fits_the_terminal(width: int, height: int) -> None:
    shown = lines(FULL, width, height)
    assert max(map(len, shown)) <= width
    assert len(shown) <= height


def test_figures_have_words_and_units() -> None:
    text = "\n".join(lines(FULL, 200, 200))
    for expected in (
        "32.4 tokens/s, 410 prompt tokens/s",
        "3 open, 1 waiting; 40 since the start; 2 sequences take turns; 2 found the queue full, "
        "1 failed; 5 conversations went on, 4,100 tokens saved",
        "first token 210 ms (95 % below 1.5 s); between tokens 31 ms (95 % below 45 ms)",
        "91.3% lately, 94.0% since the start",
        "31% busy, 209.8 MiB/s; a read takes 0.40 ms (95 % below 3 ms)",
        "12% of the time: 12% for the store's answer",
        "812.0 MiB of 1.0 GiB: expert slots 300.0 MiB",
        "least frequently used is in charge: led lru of late",
        "90.00%  -5.00  least frequently used",
        "KL 0.0020 nats (surely below 0.0040, limit 0.0099), 99.0% the same token",
    ):
        assert expected in text, expected


def test_what_is_away_is_named() -> None:
    alone = Figures(at_s=0.0, away={"node": "nothing listens there"})
    text = "\n".join(lines(alone, 80, 24))
    assert "node is away: nothing listens there" in text
    assert "nothing was computed yet" in text


def test_old_memory_is_called_old() -> None:
    assert FULL.memory is not None
    old = replace(FULL, memory=replace(FULL.memory, age_s=60.0))
    assert "60 s old: the launcher is away" in "\n".join(lines(old, 200, 200))


def test_the_heat_map_shows_each_expert_where_there_is_room() -> None:
    rows = [HeatRow(0, "0123"), HeatRow(1, "4000")]
    assert heat_map(rows, 80, 10).plain.splitlines()[1:] == ["  0 ·▪█↓", "  1 ?···"]


def test_the_heat_map_folds_and_says_so() -> None:
    """Of several under a mark, what goes on now shows first."""
    rows = [HeatRow(0, "00120000"), HeatRow(1, "11004310")]
    legend, *marks = heat_map(rows, 8, 3).plain.splitlines()
    assert legend.endswith("a mark is 2 x 2")
    assert marks == ["  0 ▪█↓▪"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00031, "0.31 ms"), (0.0312, "31 ms"), (1.26, "1.3 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
