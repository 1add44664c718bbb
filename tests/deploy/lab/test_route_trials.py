"""Trials begin from the same cache, and figures compare a route with the exact run beside it.

Planted faults seen red: no warming, exact asked for by an empty route, times compared with another
exact run, bytes of exact taken for a route's, passages of the first texts alone.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from compute_node.client.result import ScoredToken
from deploy.lab.knob_search import Goal
from deploy.lab.knobs import knobs_of
from deploy.lab.perplexity import TextScore
from deploy.lab.route_trials import RouteTrials, Trial, cut, setting_of
from deploy.lab.tuning import Tuning
from deploy.terminal.prompts import Prompt
from proto import errors

TEXTS = [Prompt(f"t{n}", f"{n}" * 3000) for n in range(6)]


def names(passages: list[Prompt]) -> list[str]:
    return [passage.name for passage in passages]


def test_passages_are_spread_over_all_texts() -> None:
    assert names(cut(TEXTS, 3, 100)) == ["t0", "t2", "t5"]
    assert names(cut(TEXTS, 8, 100)) == ["t0", "t1", "t2", "t3", "t4", "t5", "t0", "t1"]
    assert len({passage.text for passage in cut([Prompt("a", "ab" * 3000)], 9, 100)}) <= 9
    assert len(cut(TEXTS, 100, 100)) == 6 * 3  # no more than there is: 3,000 of 1,200 characters
    assert names(cut([Prompt("short", "one")], 4, 100)) == ["short"]
    assert "".join(p.text for p in cut(TEXTS[:1], 9, 100)) == TEXTS[0].text


class FakeNode:
    """Every text has `num_tokens`; a route costs .01 nats a token."""

    def __init__(self, num_tokens: int = 100) -> None:
        self.asked: list[tuple[str, str]] = []
        self.num_tokens = num_tokens
        self.cancelled = 0

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(bytes_read=1000 * len(self.asked))

    def score(self, text: str, route: str, check_every: int, **options: Any) -> Any:
        self.asked.append((text[:2], route))
        node, nats = self, 2.0 + 0.01 * (route != "exact")
        checked = (0.02, False) if check_every else (None, None)

        class Call(list[ScoredToken]):
            def cancel(self) -> None:
                node.cancelled += 1

        return Call(
            [ScoredToken(1, -nats), ScoredToken(1, -nats, *checked)] * (self.num_tokens // 2)
        )


def trials(node: FakeNode) -> RouteTrials:
    return RouteTrials(node, cut(TEXTS, 2, 100), 100)  # type: ignore[arg-type]


def test_a_trial_begins_with_the_first_passage_routed_exactly() -> None:
    """By name: an empty route is what the node does unasked, which may be lossy."""
    node = FakeNode()
    trials(node).run("skip .5")
    assert node.asked[:3] == [("00", "exact"), ("00", "skip .5"), ("55", "skip .5")]


def test_checks_are_a_pass_of_their_own() -> None:
    """Of every second passage; none where nothing is lossy."""
    node = FakeNode()
    found = trials(node).run("skip .5")
    assert node.asked[3:] == [("00", "skip .5")]
    assert found.checks == ((0.02, False),) * 50 and (found.kl, found.top1) == (0.02, 0.0)
    assert trials(node).run("").checks == () and len(node.asked) == 4 + 3


def test_no_trial_begins_after_a_cancel() -> None:
    node = FakeNode()
    one = trials(node)
    one.cancel()
    one.run("skip .5")
    assert node.cancelled == len(node.asked), "each was cancelled as it began"


def test_exact_runs_before_every_round() -> None:
    node, said = FakeNode(), list[str]()
    tuning = Tuning(trials(node), knobs_of(False), Goal(most_loss=0.05), 11, said.append)
    settings = tuning.run()
    lossless = [n for n, (text, route) in enumerate(node.asked) if (text, route) == ("55", "exact")]
    assert lossless[:2] == [2, 3 + 9 * 4 + 2], "nine settings of the coarse grid between"
    assert [one.route for one in settings[:3]] == ["", "skip 0.5", "skip 0.75"]
    assert len(settings) == 12 and len(said) == 11
    assert (tuning.num_tokens, tuning.num_checked) == (200, 50)
    assert settings[1].kl == 0.02 and settings[0].kl == 0
    assert settings[1].perplexity == pytest.approx(math.exp(0.01))


def test_too_little_text_is_refused() -> None:
    tuning = Tuning(trials(FakeNode(20)), knobs_of(False), Goal(most_loss=0.05), 11, print)
    with pytest.raises(errors.InvalidRequest, match="40 tokens to score, which says nothing"):
        tuning.run()


def trial(route: str, nats: float, *token_s: float, bytes_read: int = 300) -> Trial:
    """Two texts of three tokens each."""
    text = (ScoredToken(1, -nats),) * 3
    return Trial(route, TextScore((text, text), 1.0, bytes_read, ((token_s), (token_s))))


def test_figures_of_a_setting() -> None:
    exact = [trial("", 2.0, 0.1, 0.1), trial("", 2.0, 0.2, 0.2, bytes_read=900)]
    found = setting_of(trial("skip .5", 2.1, 0.05, 0.15), exact[1], exact)
    assert found.perplexity == pytest.approx(math.exp(0.1))
    assert found.bytes_per_token == 50 and found.bytes_ratio == pytest.approx(0.5)
    assert found.token_ms == pytest.approx(150 * 0.5), "half the time of the exact run beside it"
    assert (found.token_ms_p50, found.token_ms_p95) == pytest.approx((100, 150))


def test_figures_of_exact() -> None:
    exact = [trial("", 2.0, 0.1, 0.1), trial("", 2.0, 0.2, 0.2, bytes_read=900)]
    found = setting_of(exact[0], exact[0], exact)
    assert found.is_exact and found.bytes_ratio == 1 and found.kl == 0
    assert (found.perplexity, found.perplexity_low, found.perplexity_high) == (1, 1, 1)
    assert found.token_ms == pytest.approx(150)


def test_without_checks_nothing_is_said_of_kl() -> None:
    exact = trial("", 2.0, 0.1, 0.1)
    found = setting_of(trial("skip .5", 2.1, 0.05, 0.15), exact, [exact])
    assert found.kl is None and found.top1 is None


def test_a_hiccup_in_one_passage_does_not_count() -> None:
    steady = TextScore(((),) * 3, 1.0, 0, ((0.1,), (0.1,), (0.1,)))
    hiccup = TextScore(((),) * 3, 1.0, 0, ((0.05,), (0.05,), (9.0,)))
    assert Trial("skip .5", hiccup).slowness(Trial("", steady)) == pytest.approx(0.5)
