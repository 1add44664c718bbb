"""A default quality budget is checked before anything starts, and a card of another memory is
announced.

Planted faults seen red: a card of another memory
taken in silence, a budget served without a card.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.settings import ServeSettings
from deploy.stack.quality_check import check_quality
from proto import errors
from proto.quality import QUALITY_NAME
from tests.proto.test_quality import EXACT, card, setting

MEMORY = 1 << 20


def check(settings: ServeSettings, store: Path, experts_bytes: int = MEMORY) -> str:
    return check_quality(settings, store, "f00d", experts_bytes)


def test_a_budget_without_a_card_names_the_remedy(tmp_path: Path) -> None:
    assert check(ServeSettings(), tmp_path) == ""
    with pytest.raises(errors.ConfigInvalid, match=f"run `flashmoe tune {tmp_path} --text FILES`"):
        check(ServeSettings(quality="1%"), tmp_path)


def test_a_card_that_fits_says_nothing(tmp_path: Path) -> None:
    card().write(tmp_path / QUALITY_NAME)
    assert check(ServeSettings(quality="1%"), tmp_path) == ""
    assert check(ServeSettings(), tmp_path) == ""


def test_another_memory_is_announced(tmp_path: Path) -> None:
    card().write(tmp_path / QUALITY_NAME)
    found = check(ServeSettings(quality="1%"), tmp_path, MEMORY // 2)
    assert "was measured with 1.0 MiB for experts, this stack has 512.0 KiB" in found


@pytest.mark.parametrize("quality", ["exact", "1%"])
def test_a_damaged_card_is_refused(tmp_path: Path, quality: str) -> None:
    """Under exact, too: a request may ask for a budget."""
    (tmp_path / QUALITY_NAME).write_text("{}")
    with pytest.raises(errors.QualityCardInvalid, match="run `flashmoe tune` again, or remove it"):
        check(ServeSettings(quality=quality), tmp_path)


def test_a_budget_that_buys_nothing_is_announced(tmp_path: Path) -> None:
    card(EXACT, setting("prior .2", 1.03, 0.02, 40.0)).write(tmp_path / QUALITY_NAME)
    assert "quality 1% buys nothing by" in check(ServeSettings(quality="1%"), tmp_path)


def test_no_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="is no budget"):
        check(ServeSettings(quality="one"), tmp_path)


def test_the_card_may_be_named(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    named = ServeSettings(compute_node={"quality_path": str(elsewhere), "quality": "1%"})
    with pytest.raises(errors.ConfigInvalid, match="name what `flashmoe tune --out` wrote"):
        check(named, tmp_path)
    card().write(elsewhere)
    assert check(named, tmp_path) == "" and named.default_quality == "1%"
    assert named.quality_card(tmp_path) == elsewhere


def test_a_stack_that_tunes_has_no_card_and_is_exact(tmp_path: Path) -> None:
    """Its own, damaged one must not keep it from starting."""
    (tmp_path / QUALITY_NAME).write_text("{}")
    tables = {"quality_path": str(tmp_path / QUALITY_NAME), "quality": "1%", "threads": 1}
    left = ServeSettings(quality="2%", compute_node=tables).untuned()
    assert left.quality_card(tmp_path) is None and left.default_quality == "exact"
    assert left.compute_node == {"threads": 1} and check(left, tmp_path) == ""


def test_a_flag_wins_over_the_file_and_serve_over_the_node() -> None:
    """The reference file sets the node's own to exact, which must not undo what [serve] says."""
    assert ServeSettings(quality="2%", compute_node={"quality": "exact"}).default_quality == "2%"
    named = ServeSettings(compute_node={"quality": "1%"})
    assert named.default_quality == "1%"
    assert named.with_flags(quality="exact").default_quality == "exact"
    assert named.with_flags(quality=None).default_quality == "1%"
