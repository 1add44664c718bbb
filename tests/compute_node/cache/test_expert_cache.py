"""Capacity, pins, waves, lost sessions.

Planted faults seen red: reading a resident expert again in prefill, keeping leases of a broken
session, leases under way forgotten or not counted, hits of the step not pinned, a session ended
because a request was cancelled, a gone request's check asked on behalf of the next.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.store.memory import Borrowed
from proto import errors
from proto.expert import ExpertKey, RecordKey
from proto.redis_schema import Advice
from tests.fakes import FakeLender, make_capacity

LAYERS = (1, 3)


def make_cache(slots: int = 8, pooled: bool = False) -> tuple[ExpertCache, FakeLender]:
    capacity = make_capacity(slots, LAYERS, 2, pooled)
    lender = FakeLender(slots)
    cache = ExpertCache(lender, capacity, PolicyChooser("lru", 16.0, LAYERS, 16, lambda: None))
    cache.open()
    return cache, lender


def step(
    cache: ExpertCache, layer: int, *experts: int, check: Callable[[], None] = never
) -> list[list[int]]:
    """Waves: hits together, then each expert as it comes."""
    return [[b.key.expert for b in wave] for wave in cache.step(layer, experts, check)[1]]


def test_a_hit_costs_no_exchange() -> None:
    cache, lender = make_cache()
    step(cache, 1, 0, 1)
    step(cache, 1, 0, 1)
    assert len(lender.exchanges) == 1
    assert (cache.counters[1].hits, cache.counters[1].misses) == (2, 2)


def test_misses_of_a_layer_are_one_exchange_releases_included() -> None:
    cache, lender = make_cache()
    step(cache, 1, 0, 1)
    step(cache, 1, 2, 3)
    step(cache, 1, 4, 5)
    key = RecordKey.exact
    assert lender.exchanges[-1] == ([key(1, 0), key(1, 1)], [key(1, 4), key(1, 5)])


@pytest.mark.parametrize("pooled", [False, True])
def test_prefill_reads_each_expert_once_even_when_it_does_not_fit(pooled: bool) -> None:
    cache, lender = make_cache(pooled=pooled)
    step(cache, 1, 14, 15)
    lender.exchanges.clear()
    waves = step(cache, 1, *range(16))
    assert waves[0] == [14, 15], "what is resident comes first"
    assert sorted(expert for wave in waves for expert in wave) == list(range(16))
    acquired = [key.expert.expert for _, acquires in lender.exchanges for key in acquires]
    assert sorted(acquired) == list(range(14))
    assert len(cache) <= 8 and len(lender.held) == len(cache)


def test_what_the_step_needs_is_never_evicted_however_low_it_scores() -> None:
    scores = np.ones((2, 16), dtype=np.float32)
    scores[:, 0] = 0.0
    advice = Advice("scored", 1, 0, 1.0, scores)
    capacity, lender = make_capacity(8, LAYERS, 2, pooled=False), FakeLender(8)
    cache = ExpertCache(lender, capacity, PolicyChooser("auto", 16.0, LAYERS, 16, lambda: advice))
    cache.open()
    step(cache, 1, 0, 1, 2, 3)
    assert step(cache, 1, 0, 4) == [[0], [4]]
    assert ExpertKey(1, 0) in cache and len(cache) == 4
    assert len(lender.exchanges) == 2, "it went and came back"


def test_layers_keep_to_their_share_and_a_pool_does_not() -> None:
    for pooled, expected in ((False, 4), (True, 6)):
        cache, _ = make_cache(pooled=pooled)
        step(cache, 3, 2, 3)
        for number in range(0, 16, 2):
            step(cache, 1, number, number + 1)
            step(cache, 3, 0, 1)
        assert sum(ExpertKey(1, expert) in cache for expert in range(16)) == expected


@pytest.mark.parametrize(("pooled", "smallest"), [(False, 4), (True, 2)])
def test_too_small_a_budget_names_the_smallest_that_works(pooled: bool, smallest: int) -> None:
    with pytest.raises(errors.MemoryExceeded, match=f"at least {smallest} slots"):
        make_capacity(smallest - 1, LAYERS, 2, pooled)
    make_capacity(smallest, LAYERS, 2, pooled)


def test_uneven_slots_go_to_the_first_layers() -> None:
    capacity = make_capacity(9, LAYERS, 2, pooled=False)
    assert [capacity.layer_slots(layer) for layer in LAYERS] == [5, 4]


def test_broken_session_is_opened_again_and_the_step_completes() -> None:
    cache, lender = make_cache()
    step(cache, 1, 0, 1)
    lender.break_next = True
    assert step(cache, 1, 1, 2) == [[1], [2]]
    assert lender.num_opened == 2
    assert set(lender.held) == {RecordKey.exact(1, 0), RecordKey.exact(1, 1), RecordKey.exact(1, 2)}
    assert cache.counters[1].bytes_read == 300, "what the store still had was not read again"


def test_session_lost_while_idle_is_let_go() -> None:
    cache, lender = make_cache()
    step(cache, 1, 0, 1)
    lender.abort()
    cache.let_go_if_lost()
    assert len(cache) == 0
    assert step(cache, 1, 0, 1) == [[0, 1]], "the store has them still"


def test_damaged_expert_fails_the_step_and_the_rest_goes_on() -> None:
    cache, lender = make_cache()
    lender.damaged = {RecordKey.exact(1, 5)}
    with pytest.raises(errors.ExpertDamaged):
        step(cache, 1, 4, 5)
    assert step(cache, 1, 6, 7) == [[6], [7]]
    assert len(cache) == len(lender.held)


def test_a_step_that_is_given_up_costs_nothing() -> None:
    """Red when its session ends, and when leases under way are forgotten."""
    cache, lender = make_cache()
    step(cache, 1, 0, 1)
    waves = cache.step(1, [0, 2, 3])[1]
    assert [borrowed.key.expert for borrowed in next(waves)] == [0]
    waves.close()  # type: ignore[attr-defined]
    assert lender.is_open and len(cache) == 2
    assert step(cache, 1, 0, 2, 3) == [[0, 2, 3]], "what was asked for has come"
    assert (lender.num_opened, len(lender.exchanges)) == (1, 2)
    assert set(lender.held) == {RecordKey.exact(1, expert) for expert in range(4)}
    assert cache.counters[1].bytes_read == 400


def gives_up_after(num_checks: int) -> Callable[[], None]:
    left = [None] * num_checks

    def check() -> None:
        if not left:
            raise errors.Cancelled("gone")
        left.pop()

    return check


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("num_checks", [*range(8), 14, 15])
def test_a_prompt_that_is_cancelled_costs_nothing(num_checks: int, pooled: bool) -> None:
    """It needs more than fits, so that two parts are under way."""
    cache, lender = make_cache(pooled=pooled)
    with pytest.raises(errors.Cancelled):
        step(cache, 1, *range(16), check=gives_up_after(num_checks))
    waves = step(cache, 1, *range(16))
    assert sorted(expert for wave in waves for expert in wave) == list(range(16))
    assert lender.num_opened == 1 and len(cache) == len(lender.held) <= 8
    assert len(step(cache, 3, 0, 1)) == 2


def test_what_was_given_up_is_waited_for_by_the_next_request() -> None:
    """Which may be given up as well, or find the session lost, or an expert damaged."""
    cache, lender = make_cache()
    lender.damaged = {RecordKey.exact(1, 9)}
    with pytest.raises(errors.Cancelled):
        step(cache, 1, 8, 9, check=gives_up_after(1))
    with pytest.raises(errors.Cancelled):
        step(cache, 1, 0, check=gives_up_after(2))
    assert step(cache, 1, 0, 8) == [[8], [0]], "the damaged one is nothing to this request"
    with pytest.raises(errors.Cancelled):
        step(cache, 3, 5, check=gives_up_after(1))
    lender.abort()
    assert step(cache, 3, 5) == [[5]]
    assert lender.num_opened == 2 and len(cache) == len(lender.held)


def test_guesses_are_sent_after_the_misses_and_only_of_what_is_not_there() -> None:
    cache, lender = make_cache()
    step(cache, 1, 0, 1)
    asked: list[tuple[int, int]] = []
    waves: list[list[Borrowed]] = []
    disproved = [[ExpertKey(1, 9)], [], [ExpertKey(3, 8)]]

    def guess() -> list[ExpertKey]:
        asked.append((len(lender.exchanges), len(waves)))
        return [ExpertKey(1, 0), ExpertKey(3, 6 + len(asked))]

    for wave in cache.step(1, [1, 2], disproved=lambda: disproved.pop(0), guess=guess)[1]:
        waves.append(wave)
    assert asked == [(2, 0), (2, 1)], "when misses were asked for, and after what was resident"
    assert lender.prefetched == [RecordKey.exact(3, 7), RecordKey.exact(3, 8)]
    assert lender.withdrawn == [RecordKey.exact(1, 9), RecordKey.exact(3, 8)]
    lender.withdrawn.clear()
    list(cache.step(1, [1, 2], disproved=lambda: [ExpertKey(1, 8)])[1])
    assert lender.withdrawn == [RecordKey.exact(1, 8)], "also when nothing is missing"


def test_refilled_slot_discards_the_output() -> None:
    cache, lender = make_cache()
    waves = cache.step(1, [0, 1])[1]
    next(waves)
    lender.held.clear()
    with pytest.raises(errors.StaleLease):
        next(waves)


def test_check_is_asked_before_every_layer() -> None:
    cache, _ = make_cache()

    def check() -> None:
        raise errors.Cancelled("gone")

    with pytest.raises(errors.Cancelled):
        cache.step(1, [0], check)


def test_warm_start_keeps_to_the_capacity() -> None:
    cache, lender = make_cache()
    lender.in_memory = {RecordKey.exact(layer, expert) for layer in LAYERS for expert in range(16)}
    cache.open()
    assert len(cache) == 8
    assert sum(counters.bytes_read for counters in cache.counters.values()) == 0
