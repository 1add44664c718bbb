"""Figures of a moment, from what daemons said at several.

Planted faults seen red: a daemon's restart gives a negative speed, a quantile is that since the
start, the optimum has a regret, a daemon that is away hides the others, an older node without
conversations is refused, the window is a minute for what should be seconds.
"""

from __future__ import annotations

from typing import Any

import pytest

from compute_node.live.figures import Policy, Spread
from compute_node.live.look import NODE, SCHEDULER, STORE, Look
from compute_node.live.reading import Looks
from proto.histogram import Histogram
from proto.memory_report import MemoryReport
from proto.stats import Stats, Value

EMPTY = Histogram.empty((1.0, 2.0))


def histogram(*values: float) -> Histogram:
    found = Histogram.empty((1.0, 2.0))
    for value in values:
        found.observe(value)
    return found


def shown(**values: Any) -> Stats:
    return Stats([(key, {}, value) for key, value in values.items()])


def node(tokens: int, hits: int = 0, misses: int = 0, **more: Value) -> Stats:
    values = {
        "generated_tokens": tokens,
        "prompt_tokens": 7,
        "first_token_s": EMPTY,
        "between_tokens_s": EMPTY,
        "queued_s": EMPTY,
        "open": 2,
        "queued": 1,
        "requests": 9,
        "failed": 0,
        "refused": 0,
        "hits": hits,
        "misses": misses,
        "resident": 3,
        "slots": 4,
        "weights": "exact",
        "learning_obstacle": "",
    }
    return shown(**{**values, **more})


def store(busy_s: float, bytes_read: int) -> Stats:
    return shown(busy_s=busy_s, bytes_read=bytes_read, demand_read_s=EMPTY, quarantined_experts=0)


def looks(*given: tuple[float, dict[str, Stats]]) -> Looks:
    found = Looks()
    for at_s, stats in given:
        found.add(Look(at_s, stats))
    return found


def test_speed_is_of_the_last_seconds() -> None:
    given = [(float(at_s), {NODE: node(tokens)}) for at_s, tokens in ((0, 0), (56, 500), (60, 540))]
    assert looks(*given).figures().speed.tokens_per_s == 10.0


def test_the_first_look_and_a_restart_have_no_speed() -> None:
    assert looks((0.0, {NODE: node(500)})).figures().speed.tokens_per_s is None
    restarted = looks((0.0, {NODE: node(500, 90, 10)}), (1.0, {NODE: node(3, 2, 1)}))
    assert restarted.figures().speed.tokens_per_s is None
    experts = restarted.figures().experts
    assert experts is not None
    assert (experts.hit_ratio, experts.hit_ratio_ever) == (None, pytest.approx(2 / 3))


def test_latencies_are_of_the_last_minute_or_else_of_all() -> None:
    before, now = histogram(0.5, 0.5, 0.5), histogram(0.5, 0.5, 0.5, 1.5)
    figures = looks(
        (0.0, {NODE: node(0, first_token_s=before, queued_s=before)}),
        (1.0, {NODE: node(0, first_token_s=now, queued_s=before)}),
    ).figures()
    assert figures.speed.first_token_s == Spread(1.5, pytest.approx(1.95), 1)
    assert figures.speed.queued_s == Spread(0.5, pytest.approx(0.95), 3)
    assert figures.speed.between_tokens_s is None


def test_hit_ratio_lately_and_ever() -> None:
    figures = looks((0.0, {NODE: node(0, 0, 100)}), (2.0, {NODE: node(5, 90, 110)})).figures()
    assert figures.experts is not None
    assert figures.experts.hit_ratio == 0.9
    assert figures.experts.hit_ratio_ever == 0.45


def test_what_a_daemon_does_not_know_yet_is_left_out() -> None:
    without = looks((0.0, {NODE: node(0)})).figures().clients
    assert (without.sequences, without.kept_hits, without.tokens_saved) == (None, None, None)
    known = node(0, live=3, kept_hits=4, tokens_saved=900)
    clients = looks((0.0, {NODE: known})).figures().clients
    assert (clients.sequences, clients.kept_hits, clients.tokens_saved) == (3, 4, 900)


def test_one_that_is_away_hides_nothing_of_the_others() -> None:
    found = Looks()
    found.add(Look(0.0, {NODE: node(0), STORE: store(0, 0)}))
    found.add(Look(1.0, {STORE: store(0.5, 1024)}, {NODE: "it is stopping"}))
    figures = found.figures()
    assert figures.away == {"node": "it is stopping"}
    assert figures.experts is None and figures.speed.tokens_per_s is None
    assert figures.disk is not None
    assert (figures.disk.busy_share, figures.disk.bytes_per_s) == (0.5, 1024.0)


def test_stalls_by_cause_the_largest_first() -> None:
    def waited(**causes: float) -> Stats:
        more = [("stall_cause_s", {"cause": name}, spent_s) for name, spent_s in causes.items()]
        return Stats([*node(0), *more])

    figures = looks(
        (0.0, {NODE: waited(message=1.0, too_late=2.0, no_decode=0.0)}),
        (4.0, {NODE: waited(message=1.4, too_late=4.0, no_decode=0.0)}),
    ).figures()
    assert list(figures.stalls.items()) == [
        ("for guessed ones that were not read yet", 0.5),
        ("for the store's answer", pytest.approx(0.1)),
    ]


def test_policies_are_of_the_node_that_was_followed_most() -> None:
    def followed(name: str, steps: int, **ratios: float) -> list[Any]:
        of = {"node": name}
        facts = {"in_charge": "lfu", "why": "led lru", "switches": 1, "steps": steps}
        scores = {"hit_ratio": 1, "windowed_hit_ratio": 1, "windowed_regret": 1}
        assert scores
        return [
            *((key, of, value) for key, value in facts.items()),
            *(
                (key, {**of, "policy": policy}, value)
                for policy, ratio in ratios.items()
                for key, value in (
                    ("hit_ratio", ratio),
                    ("windowed_hit_ratio", ratio),
                    ("windowed_regret", ratios["min"] - ratio),
                )
            ),
            ("is_in_charge", {**of, "policy": "lfu"}, 1),
        ]

    scheduler = Stats([*followed("old", 3, min=0.5), *followed("new", 9, lfu=0.75, min=0.875)])
    policies = looks((0.0, {SCHEDULER: scheduler})).figures().policies
    assert policies is not None
    assert (policies.node, policies.in_charge, policies.why) == ("new", "lfu", "it led lru")
    assert policies.scores == (
        Policy("min", "optimum (MIN)", 0.875, None),
        Policy("lfu", "least frequently used", 0.75, 0.125),
    )


def test_memory_and_heat() -> None:
    found = Looks()
    report = MemoryReport(100, 90, 50, parts={"valkey": 10, "segment": 40})
    found.add(Look(0.0, {}, heat={3: bytes([0, 2, 4])}, memory=report))
    figures = found.figures()
    assert figures.memory is not None
    assert list(figures.memory.parts.items()) == [("expert slots", 40), ("Valkey", 10)]
    assert [(row.layer, row.states) for row in figures.heat] == [(3, "024")]
