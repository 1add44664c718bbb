"""Golden miss counts of every local policy on a recorded trace, event-atomic, per layer and pooled.

Planted faults seen red: a decayed count that forgets its past, age off by one in LFRU.
"""

from __future__ import annotations

import numpy as np
import pytest

from compute_node.cache.asked import exact
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.occupancy import Coming
from compute_node.cache.policies.decayed import Decayed
from compute_node.cache.policies.importance import Importance
from compute_node.cache.policies.lfru import Lfru
from compute_node.cache.policies.lfu import Lfu
from compute_node.cache.policies.lru import Lru
from compute_node.cache.policies.policy import EvictionPolicy
from compute_node.cache.policies.scored import Scored
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.cache.residents import Residents, Wanted
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey
from proto.redis_schema import Advice
from tests.compute_node.traces import load
from tests.fakes import FakeLender, make_capacity

# tests/traces/tiny-moe-decode.npz: 360 steps of 8 layers, 4 of 32 experts
GOLDEN_MISSES = {
    ("lru", 6, "layer"): 3893,
    ("lru", 6, "pool"): 3903,
    ("lru", 12, "layer"): 1355,
    ("lru", 12, "pool"): 1244,
    ("lru", 16, "layer"): 655,
    ("lru", 16, "pool"): 568,
    ("lfu", 6, "layer"): 4100,
    ("lfu", 6, "pool"): 4705,
    ("lfu", 12, "layer"): 1515,
    ("lfu", 12, "pool"): 1711,
    ("lfu", 16, "layer"): 808,
    ("lfu", 16, "pool"): 753,
    ("lfru", 6, "layer"): 3676,
    ("lfru", 6, "pool"): 3636,
    ("lfru", 12, "layer"): 1241,
    ("lfru", 12, "pool"): 1122,
    ("lfru", 16, "layer"): 649,
    ("lfru", 16, "pool"): 560,
    ("decayed", 6, "layer"): 3606,
    ("decayed", 6, "pool"): 3395,
    ("decayed", 12, "layer"): 1191,
    ("decayed", 12, "pool"): 1093,
    ("decayed", 16, "layer"): 584,
    ("decayed", 16, "pool"): 536,
}
BELADY_MISSES = {6: 2976, 12: 772, 16: 382}


def misses(policy: str, slots_per_layer: int, pooled: bool) -> int:
    """Through the cache that runs live."""
    topk_ids, num_experts = load()
    layers = tuple(range(topk_ids.shape[1]))
    chooser = PolicyChooser(policy, 16.0, layers, num_experts, lambda: None)
    capacity = make_capacity(slots_per_layer * len(layers), layers, topk_ids.shape[2], pooled)
    cache = ExpertCache(FakeLender(capacity.slots), capacity, chooser)
    cache.open()
    for step in topk_ids:
        for layer in layers:
            _, waves = cache.step(layer, sorted(step[layer].tolist()))
            assert sum(len(wave) for wave in waves) == len(step[layer])
    return sum(counters.misses for counters in cache.counters.values())


def belady_misses(slots: int) -> int:
    """The offline optimum for the same events: farthest next use goes first."""
    topk_ids, num_experts = load()
    total = 0
    for layer in range(topk_ids.shape[1]):
        uses = [set(step[layer].tolist()) for step in topk_ids]
        next_use = np.full((len(uses) + 1, num_experts), len(uses) + 1)
        for t in range(len(uses) - 1, -1, -1):
            next_use[t] = next_use[t + 1]
            next_use[t, list(uses[t])] = t
        resident: set[int] = set()
        for t, used in enumerate(uses):
            total += len(used - resident)
            excess = len(resident | used) - slots
            evictable = sorted(resident - used, key=lambda e: -next_use[t + 1, e])
            resident = (resident | used) - set(evictable[: max(0, excess)])
    return total


@pytest.mark.parametrize("scope", ["layer", "pool"])
@pytest.mark.parametrize("slots", [6, 12, 16])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "decayed"])
def test_golden_misses(policy: str, slots: int, scope: str) -> None:
    got = misses(policy, slots, pooled=scope == "pool")
    assert got == GOLDEN_MISSES[policy, slots, scope]
    if scope == "layer":
        assert got >= belady_misses(slots) == BELADY_MISSES[slots]


KEYS = [ExpertKey(0, expert) for expert in range(4)]


def victims(policy: EvictionPolicy, held: list[ExpertKey], count: int) -> list[ExpertKey]:
    residents = Residents([0])
    for arrival in lent(held):
        residents.insert(arrival)
    going, _ = residents.victims(policy, Wanted(Coming(count), len(held)))
    return going


def lent(keys: list[ExpertKey]) -> list[Borrowed]:
    lender = FakeLender()
    lender.open()
    return lender.exchange([], exact(keys))


def test_lru_evicts_the_oldest_and_breaks_ties_by_key() -> None:
    policy = Lru()
    policy.on_step(0, [KEYS[2], KEYS[3]])
    policy.on_step(0, [KEYS[1]])
    assert victims(policy, KEYS, 3) == [KEYS[0], KEYS[2], KEYS[3]]


def test_lfu_keeps_counts_of_what_was_evicted() -> None:
    policy = Lfu()
    for _ in range(3):
        policy.on_step(0, [KEYS[0]])
    policy.on_step(0, [KEYS[1]])
    assert victims(policy, KEYS[:2], 1) == [KEYS[1]]


def test_lfru_divides_by_age() -> None:
    policy = Lfru()
    for _ in range(3):
        policy.on_step(0, [KEYS[0]])
    for _ in range(4):
        policy.on_step(0, [KEYS[1]])
    assert policy.rank(KEYS[0]) == 3 / 5
    assert policy.rank(KEYS[1]) == 4 / 1


def test_decayed_halves_in_a_half_life() -> None:
    policy = Decayed(half_life_tokens=2.0)
    policy.on_step(0, [KEYS[0]])
    for _ in range(2):
        policy.on_step(0, [])
    assert policy.rank(KEYS[0]) == pytest.approx(0.5)


def test_importance_goes_by_gates_of_all_and_halves_them_in_a_half_life() -> None:
    """Red when chosen experts alone count, or nothing decays."""
    policy = Importance(half_life_tokens=2.0)
    policy.weigh(0, np.array([0.5, 0.25, 0.0, 0.25]))
    policy.on_step(0, [KEYS[0]])
    for _ in range(2):
        policy.weigh(0, np.array([0.0, 0.25, 0.0, 0.0]))
    assert policy.rank(KEYS[0]) == pytest.approx(0.25)
    assert policy.rank(KEYS[1]) == pytest.approx(0.25 / 2 + 0.25 / 2**0.5 + 0.25)
    assert victims(policy, KEYS, 2) == [KEYS[2], KEYS[3]]
    assert policy.rank(ExpertKey(1, 0)) == 0.0, "of a layer that had no step"


def test_without_importance_gates_go_nowhere() -> None:
    chooser = PolicyChooser("auto", 16.0, [0], 4, lambda: advice("importance", None))
    chooser.weigh(0, np.ones(4))
    assert isinstance(chooser.choose(), Decayed)
    assert (chooser.name, chooser.num_fallbacks) == ("decayed", 1)


def test_scored_evicts_the_lowest_score() -> None:
    scores = np.array([[0.9, 0.1, 0.5, 0.2]], dtype=np.float32)
    policy = Scored(advice("scored", scores), scores, {0: 0})
    assert victims(policy, KEYS, 2) == [KEYS[1], KEYS[3]]


def advice(policy: str, scores: np.ndarray | None) -> Advice:
    return Advice(policy, 1, 0, 1.0, scores)


def test_charge_follows_fresh_advice_and_counts_fallbacks() -> None:
    """None (no advice) and advice of another shape both fall back, and say so."""
    given: list[Advice | None] = [None]
    chooser = PolicyChooser("auto", 16.0, [0], 4, lambda: given[0])
    assert chooser.choose() is not None and chooser.name == "decayed"
    given[0] = advice("scored", np.zeros((1, 4), np.float32))
    assert isinstance(chooser.choose(), Scored) and chooser.name == "scored"
    given[0] = advice("lru", None)
    assert isinstance(chooser.choose(), Lru)
    given[0] = advice("scored", np.zeros((2, 4), np.float32))
    chooser.choose()
    given[0] = advice("no such policy", None)
    chooser.choose()
    assert (chooser.num_advised, chooser.num_fallbacks) == (2, 3)


@pytest.mark.parametrize("name", ["river", "learned"])
def test_a_policy_that_scores_is_followed_by_its_name_alone(name: str) -> None:
    """Red when a node told to follow one policy follows whatever is advised, or nothing."""
    given: list[Advice | None] = [None]
    scores = np.zeros((1, 4), np.float32)
    chooser = PolicyChooser(name, 16.0, [0], 4, lambda: given[0])
    assert chooser.name == "decayed"
    chooser.choose()
    given[0] = advice("other", scores)
    chooser.choose()
    given[0] = advice("lru", None)
    chooser.choose()
    assert (chooser.name, chooser.num_advised, chooser.num_fallbacks) == ("decayed", 0, 3)
    given[0] = advice(name, scores)
    assert isinstance(chooser.choose(), Scored)
    assert (chooser.name, chooser.num_advised) == (name, 1)


def test_switch_needs_no_warm_up() -> None:
    given: list[Advice | None] = [advice("lru", None)]
    chooser = PolicyChooser("auto", 16.0, [0], 4, lambda: given[0])
    chooser.on_step(0, [KEYS[0], KEYS[1]])
    chooser.on_step(0, [KEYS[1]])
    given[0] = advice("lfu", None)
    assert victims(chooser.choose(), KEYS[:2], 1) == [KEYS[0]]
