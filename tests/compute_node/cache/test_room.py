"""What goes for guesses and for misses: never what the step uses, what is expected last of all.

Planted faults seen red: expected experts given up like others, spare slots not counted, guesses
that found no room asked for.
"""

from __future__ import annotations

from compute_node.cache.asked import exact, never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from proto.expert import ExpertKey
from tests.fakes import FakeLender, make_capacity


def cache_of(slots: int, num_spare: int = 0, pooled: bool = True) -> tuple[ExpertCache, FakeLender]:
    """Two layers of eight experts, the least recently used goes first; filled with layer 0's."""
    lender = FakeLender(slots)
    chooser = PolicyChooser("lru", 16, (0, 1), 8, lambda: None)
    cache = ExpertCache(lender, make_capacity(slots, (0, 1), 2, pooled), chooser)
    cache.room.num_spare = num_spare
    cache.open()
    return cache, lender


def use(cache: ExpertCache, layer: int, *experts: int) -> None:
    for _ in cache.step(layer, list(experts), never)[1]:
        pass


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def test_guesses_fill_what_is_free_first() -> None:
    cache, lender = cache_of(4, num_spare=1)
    use(cache, 0, 0, 1)
    assert cache.read_ahead(1, keys(1, 0, 1, 2), [], 3) == keys(1, 0, 1, 2)
    assert lender.prefetched == exact(keys(1, 0, 1, 2))
    assert len(cache) == 2, "two slots were free, one is spare"


def test_then_what_the_policy_values_least() -> None:
    cache, _ = cache_of(4)
    use(cache, 0, 0, 1)
    use(cache, 0, 2, 3)
    assert cache.read_ahead(1, keys(1, 5), [], 1) == keys(1, 5)
    assert ExpertKey(0, 0) not in cache
    assert all(key in cache for key in keys(0, 1, 2, 3))


def test_never_what_the_step_uses_or_will_use() -> None:
    cache, lender = cache_of(4)
    use(cache, 0, 0, 1)
    use(cache, 0, 2, 3)
    cache.room.expect(1, keys(0, 0))
    assert cache.read_ahead(1, keys(1, 5, 6, 7), [], 3) == keys(1, 5), "one could go"
    assert lender.prefetched == exact(keys(1, 5))
    assert all(key in cache for key in keys(0, 0, 2, 3))


def test_misses_take_what_is_expected_last() -> None:
    cache, _ = cache_of(4)
    use(cache, 0, 0, 1)
    use(cache, 0, 2, 3)
    cache.room.expect(1, keys(0, 0, 1, 2))
    use(cache, 0, 4)
    assert all(key in cache for key in keys(0, 0, 1, 2, 4)), "3 was not expected"
    use(cache, 0, 4, 5)
    assert ExpertKey(0, 5) in cache, "a miss that has to fit fits"
    assert ExpertKey(0, 0) not in cache


def test_of_one_layer_where_slots_are_divided() -> None:
    cache, _ = cache_of(4, pooled=False)
    use(cache, 0, 0, 1)
    use(cache, 1, 0, 1)
    use(cache, 0, 0, 1)
    assert cache.read_ahead(1, keys(1, 5), [], 1) == keys(1, 5)
    assert all(key in cache for key in keys(0, 0, 1))
    assert ExpertKey(1, 0) not in cache


def test_wrong_guesses_are_withdrawn_with_the_same_message() -> None:
    cache, lender = cache_of(4)
    assert cache.read_ahead(1, [], keys(1, 3), 0) == []
    assert lender.withdrawn == exact(keys(1, 3))
