"""The card in plain words: every setting has its row, and what is said is of the one chosen.

Planted fault seen red: exact's figures said of the setting.
"""

from __future__ import annotations

from pathlib import Path

from deploy.lab import quality_plot
from deploy.report.quality_report import bought, document
from proto.quality import Budget
from tests.proto.test_quality import card


def test_says_what_was_bought_and_what_it_costs() -> None:
    chosen = card().ladder(Budget.parse("1%"))[-1]
    text = document(card(), "olmoe", chosen, "a quality budget of 1%")
    assert "# Quality card of olmoe" in text
    assert "`prior .1` decodes 30.0 tokens/s where exact decodes 10.0 (3.00 x)" in text
    assert "perplexity: 1.0040 times exact's, between 1.0030 and 1.0050" in text
    assert "Of 1,000 tokens, 990 are the likeliest of the exact model, too (KL 0.0099" in text
    assert "- prior: an expert in memory is preferred" in text
    assert "with 1.0 MiB of memory for experts, on 3 passages of heldout.jsonl, 600 tokens" in text


def test_tables_have_every_budget_and_every_setting() -> None:
    lines = document(card(), "olmoe", card().exact, "a quality budget of 1%").split("\n")
    assert any(line.startswith("| 0.1% | exact |") for line in lines)
    assert any(line.startswith("| 0.5% | skip .5 |") for line in lines)
    assert any(line.startswith("| 1% | prior .1 |") for line in lines)
    for setting in card().settings:
        name = setting.route or "exact"
        on_frontier = setting in card().frontier
        assert sum(line.startswith(f"| **{name}** |") for line in lines) == on_frontier
        assert sum(line.startswith(f"| {name} |") for line in lines) == (not on_frontier)


def test_exact_costs_nothing() -> None:
    assert bought(card(), card().exact).startswith("Everything stays exact: 10.0 tokens/s")


def test_draws_every_setting(tmp_path: Path) -> None:
    quality_plot.draw(tmp_path / "q.svg", card(), "olmoe: tokens a second over perplexity")
    picture = (tmp_path / "q.svg").read_text()
    assert picture.startswith("<?xml") and "<svg" in picture
    quality_plot.draw(tmp_path / "q.svg", card(card().exact), "only exact")
