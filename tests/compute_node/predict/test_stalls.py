"""Why decode waited.

Planted faults seen red: the whole wait charged to the read, a guessed expert's read counted as not
foreseen, an answer from memory counted as a read, a prompt's wait counted as decode's.
"""

from __future__ import annotations

import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.predict.foresight import Settled
from compute_node.predict.layer_timer import LayerTimer
from compute_node.predict.stalls import StallCauses, Stalls
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey
from tests.fakes import FakeLender, make_capacity

GUESSED, OTHER = ExpertKey(3, 1), ExpertKey(3, 2)


def came(key: ExpertKey, read_s: float, verify_s: float = 0.0) -> Borrowed:
    """read_s: 0: it was in memory"""
    return Borrowed(key, 0, 0, 0, 8, {}, 8 if read_s else 0, read_s, verify_s)


@pytest.fixture
def stalls() -> Stalls:
    stalls = Stalls()
    stalls.enter(3, {GUESSED})
    return stalls


def test_a_reads_own_time_is_by_whether_it_was_guessed(stalls: Stalls) -> None:
    stalls.waited(3, 0.5, [came(GUESSED, 2.0)])
    stalls.waited(3, 1.0, [came(OTHER, 1.0)])
    assert stalls.by_layer == {3: StallCauses(too_late=0.5, not_foreseen=1.0)}


def test_what_passes_before_the_read_begins_is_the_busy_disks(stalls: Stalls) -> None:
    stalls.waited(3, 5.0, [came(OTHER, 1.0, verify_s=0.5)])
    assert stalls.by_layer == {3: StallCauses(disk_busy=3.5, not_foreseen=1.5)}


def test_what_was_read_before_costs_a_message(stalls: Stalls) -> None:
    stalls.waited(3, 0.25, [came(GUESSED, 0.0)])
    assert stalls.by_layer == {3: StallCauses(message=0.25)}


def test_together_they_are_not_foreseen_if_one_was_not(stalls: Stalls) -> None:
    stalls.waited(3, 3.0, [came(GUESSED, 1.0), came(OTHER, 2.0)])
    assert stalls.by_layer == {3: StallCauses(disk_busy=1.0, not_foreseen=2.0)}


def test_other_waits_are_no_decode(stalls: Stalls) -> None:
    """Another layer's leftovers, a wait that was given up, and what a prompt waits for."""
    stalls.waited(5, 1.0, [came(ExpertKey(5, 1), 1.0)])
    stalls.waited(3, 1.0, [])
    stalls.leave()
    stalls.waited(3, 1.0, [came(OTHER, 1.0)])
    assert stalls.by_layer == {5: StallCauses(no_decode=1.0), 3: StallCauses(no_decode=2.0)}


def test_the_causes_add_up_to_what_the_cache_waited() -> None:
    chooser = PolicyChooser("lru", 16.0, (1, 3), 16, lambda: None)
    cache = ExpertCache(FakeLender(), make_capacity(4, (1, 3), 2, pooled=True), chooser)
    timer = LayerTimer(cache)
    for layer in (1, 3):
        if layer == 3:
            timer.enter(layer, Settled({GUESSED}, [], 1))
        for _ in cache.step(layer, [1, 2])[1]:
            pass
    for layer, causes in timer.stalls.by_layer.items():
        assert sum(vars(causes).values()) == pytest.approx(cache.counters[layer].stall_s)
    assert timer.stalls.by_layer.keys() == {1, 3}
