"""A quality card survives the disk, a wrong one is refused by name, and a budget buys the fastest
setting that keeps to it.

Planted faults seen red: a changed figure taken, a card of another store taken, a ladder with what
is slower and lossier, KL left out of `is_within`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from proto import quality
from proto.errors import InvalidRequest, QualityCardInvalid
from proto.quality import Budget, QualityCard, Setting


def setting(route: str, ppl: float = 1.0, kl: float | None = 0.0, speed: float = 10.0) -> Setting:
    return Setting(
        route=route,
        perplexity=ppl,
        perplexity_low=ppl - 0.001,
        perplexity_high=ppl + 0.001 if route else 1.0,
        worst_text=ppl,
        kl=kl,
        top1=None if kl is None else 0.99,
        bytes_ratio=0.5,
        bytes_per_token=1e6,
        tokens_per_s=speed,
        token_ms_p50=1000 / speed,
        token_ms_p95=1200 / speed,
    )


EXACT = setting("")
SETTINGS = (
    setting("prior .2", 1.03, 0.02, 40.0),
    setting("prior .05", 1.0, 0.001, 15.0),
    EXACT,
    setting("skip .5", 1.001, 0.002, 25.0),
    setting("substitute .5", 1.001, 0.003, 14.0),  # slower and lossier than skip
    setting("skip .1", 1.0, 0.0005, 9.0),  # slower than exact
    setting("prior .1", 1.004, 0.0099, 30.0),
)


def card(*settings: Setting) -> QualityCard:
    return QualityCard(
        fingerprint="f00d",
        experts_bytes=1 << 20,
        texts="heldout.jsonl",
        num_texts=3,
        num_tokens=600,
        num_checked=60,
        settings=settings or SETTINGS,
    )


def routes(ladder: tuple[Setting, ...]) -> list[str]:
    return [one.route for one in ladder]


def test_survives_the_disk(tmp_path: Path) -> None:
    card().write(tmp_path / "quality.json")
    assert QualityCard.load(tmp_path / "quality.json", "f00d") == card()


def _document(tmp_path: Path) -> dict[str, Any]:
    card().write(tmp_path / "quality.json")
    document: dict[str, Any] = json.loads((tmp_path / "quality.json").read_text())
    return document


def _signed(document: dict[str, Any]) -> dict[str, Any]:
    document.pop("checksum", None)
    return document | {"checksum": quality._checksum(document)}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"num_texts": 4}, "was changed after it was written"),
        ({"checksum": "0"}, "was changed after it was written"),
        ({"format": "flashmoe-quality-9"}, "has the format 'flashmoe-quality-9'"),
        ({"format": None}, "has the format None"),
    ],
)
def test_a_changed_card_is_refused(tmp_path: Path, damage: dict[str, Any], says: str) -> None:
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(_document(tmp_path) | damage))
    with pytest.raises(QualityCardInvalid, match=f"quality.json {says}.*run `flashmoe tune` again"):
        QualityCard.load(path, "f00d")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"more": 1}, "more: Extra inputs"),
        ({"num_tokens": "600"}, "num_tokens: Input should be a valid integer"),
        ({"num_tokens": -1}, "num_tokens: Input should be greater"),
        ({"settings": []}, "one setting is exact"),
        ({"settings": [EXACT.model_dump(), EXACT.model_dump()]}, "no route stands twice"),
        ({"settings": [EXACT.model_dump() | {"perplexity": math.inf}]}, "settings.0.perplexity"),
        ({"settings": [EXACT.model_dump() | {"top1": 1.5}]}, "settings.0.top1"),
    ],
)
def test_a_signed_card_that_makes_no_sense_is_refused(
    tmp_path: Path, damage: dict[str, Any], says: str
) -> None:
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(_signed(_document(tmp_path) | damage)))
    with pytest.raises(QualityCardInvalid, match=f"is damaged .*{says}"):
        QualityCard.load(path, "f00d")


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, "\x00"])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "quality.json"
    path.write_text(content)
    with pytest.raises(QualityCardInvalid, match="is no quality card"):
        QualityCard.load(path, "f00d")


def test_a_card_of_another_store_is_refused(tmp_path: Path) -> None:
    card().write(tmp_path / "quality.json")
    with pytest.raises(QualityCardInvalid, match="another model or an earlier index"):
        QualityCard.load(tmp_path / "quality.json", "another")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    with path.open("wb") as file:
        file.truncate(quality.MAX_BYTES + 1)
    with pytest.raises(QualityCardInvalid, match="has 4,194,305 bytes"):
        QualityCard.load(path, "f00d")


def test_a_ladder_goes_from_exact_to_what_the_budget_buys() -> None:
    assert routes(card().ladder(Budget.parse("1%"))) == ["", "prior .05", "skip .5", "prior .1"]
    assert routes(card().ladder(Budget.parse("0.25%"))) == ["", "prior .05", "skip .5"]
    assert routes(card().ladder(Budget.parse("exact"))) == [""]
    assert routes(card().frontier) == ["", "prior .05", "skip .5", "prior .1", "prior .2"]


def test_kl_alone_exceeds_a_budget() -> None:
    """Its perplexity is that of exact, by chance of the text."""
    too_far = setting("prior .3", 1.0, math.log1p(0.01) + 1e-6, 99.0)
    assert routes(card(EXACT, too_far).ladder(Budget.parse("1%"))) == [""]


def test_without_kl_perplexity_decides() -> None:
    known = card(EXACT, setting("prior .1", 1.004, None, 30.0), setting("skip .5", 1.02, None, 50))
    assert routes(known.ladder(Budget.parse("1%"))) == ["", "prior .1"]


def test_kl_of_some_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="KL is known of all settings or of none"):
        card(EXACT, setting("prior .1"), setting("skip .5", kl=None))


@pytest.mark.parametrize("one", SETTINGS, ids=lambda one: one.route or "exact")
def test_the_least_budget_buys_a_setting(one: Setting) -> None:
    least = one.least_budget
    assert one.is_within(Budget(least.fraction + 1e-12))
    assert one.is_exact or not one.is_within(Budget(least.fraction * 0.999))


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("1%", 0.01), ("0.5%", 0.005), (".1 %", 0.001), (" 100% ", 1.0), ("exact", 0.0)],
)
def test_reads_a_budget(text: str, fraction: float) -> None:
    assert Budget.parse(text).fraction == pytest.approx(fraction)


@pytest.mark.parametrize(
    "text", ["", "1", "0%", "101%", "-1%", "nan%", "1e-2%", "1%%", "one", "\u0661%", "Exact"]
)
def test_refuses_what_is_no_budget(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no budget: say exact, or by how much"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["exact", "1%", "0.05%", "100%", "0.00001%", "33.333333%"])
def test_prints_a_budget_as_it_is_said(text: str) -> None:
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    ("fraction", "said"), [(0.00471, "0.48%"), (0.02, "2%"), (0.1234, "13%"), (1e-7, "0.01%")]
)
def test_rounds_a_budget_up(fraction: float, said: str) -> None:
    assert str(Budget(fraction).rounded_up) == said


def test_the_budget_rounded_up_buys_the_setting() -> None:
    for one in SETTINGS:
        assert one.is_within(one.least_budget.rounded_up)
