"""A cache of exact and small records: what serves, what is replaced, and that leases never bind
more slots than the quota has, whatever is asked for.

Planted faults seen red: a small record that serves who needs the exact one, a hit on it counted as
a miss, parts of slots in use not counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.store.memory import Borrowed
from proto import errors
from proto.expert import ExpertKey, RecordKey
from tests.fakes import FakeArrivals, FakeLender, make_capacity

PARTS = 3
SMALL = dict.fromkeys(range(64), "int4")


def make_cache(slots: int = 4) -> tuple[ExpertCache, FakeLender]:
    lender = FakeLender(slots, num_parts=PARTS)
    chooser = PolicyChooser("lru", 16.0, (0, 1), 64, lambda: None)
    cache = ExpertCache(lender, make_capacity(slots, (0, 1), 2, True, PARTS), chooser)
    cache.open()
    return cache, lender


def use(cache: ExpertCache, *experts: int, small: bool = False, layer: int = 0) -> set[int]:
    """The hits."""
    hits, waves = cache.step(layer, experts, small=SMALL if small else {})
    assert sorted(b.key.expert for wave in waves for b in wave) == sorted(experts)
    return hits


def record(expert: int, variant: str = "int4") -> RecordKey:
    return RecordKey(ExpertKey(0, expert), variant)


def test_any_record_serves_who_allows_it_and_an_exact_one_everybody() -> None:
    cache, lender = make_cache()
    use(cache, 1)
    use(cache, 2, small=True)
    assert set(lender.held) == {RecordKey.exact(0, 1), record(2)}
    assert use(cache, 1, 2, small=True) == {1, 2}
    assert use(cache, 1, 2) == {1}
    assert set(lender.held) == {RecordKey.exact(0, 1), RecordKey.exact(0, 2)}, "in its place"
    assert ExpertKey(0, 2) in cache


def test_a_small_record_is_here_but_not_as_an_exact_one() -> None:
    cache, _ = make_cache()
    use(cache, 2, small=True)
    assert cache.holds(ExpertKey(0, 2)) and ExpertKey(0, 2) not in cache


def test_small_records_share_what_one_exact_record_takes() -> None:
    cache, lender = make_cache(slots=4)
    for expert in range(0, 12, 2):
        use(cache, expert, expert + 1, small=True)
    assert len(lender.held) == 12 == 4 * PARTS
    use(cache, 12, small=True)
    assert len(lender.held) == 12 and record(12) in lender.held
    use(cache, 20)
    assert RecordKey.exact(0, 20) in lender.held and len(lender.held) == 10


def test_bytes_read_are_those_of_the_records() -> None:
    cache, _ = make_cache()
    use(cache, 1)
    use(cache, 2, small=True)
    assert cache.counters[0].bytes_read == 100 + 100 // PARTS


def test_no_sequence_of_steps_binds_more_slots_than_the_quota() -> None:
    """The lender asserts it. Exact and small steps of two layers, prompts wider than the cache."""
    chance = random.Random(3)
    for slots in (2, 3, 7):
        cache, lender = make_cache(slots)
        for _ in range(400):
            count = chance.choice([1, 2, 2, 2, 2, 12])
            experts = chance.sample(range(16), count)
            small = count <= 2 and chance.random() < 0.7
            use(cache, *experts, small=small, layer=chance.randrange(2))
        assert len(cache) == len(lender.held)


class FullLender(FakeLender):
    """Other nodes' small records are lent in every slot, for some acquires."""

    num_full = 0

    def borrow(self, *args: Sequence[RecordKey], **more: object) -> FakeArrivals:
        if self.num_full and args[1]:
            self.num_full -= 1
            self.abort()
            raise errors.SlotsExhausted("records of smaller variants are lent in every slot")
        return super().borrow(*args, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_full", [1, 2])
def test_what_finds_no_room_is_lent_anew_once(num_full: int) -> None:
    """Red where it is tried without end, or not at all."""
    lender = FullLender(4, num_parts=PARTS)
    chooser = PolicyChooser("lru", 16.0, (0, 1), 64, lambda: None)
    cache = ExpertCache(lender, make_capacity(4, (0, 1), 2, True, PARTS), chooser)
    cache.open()
    use(cache, 1, 2, small=True)
    lender.num_full = num_full
    if num_full == 1:
        use(cache, 3)
        assert lender.num_opened == 2
    else:
        with pytest.raises(errors.SlotsExhausted):
            use(cache, 3)
    use(cache, 1, 2, small=True)
    assert len(cache) == len(lender.held)


def test_a_small_record_read_alone_tells_the_devices_speed_not_an_experts_time() -> None:
    cache, _ = make_cache()
    small = {"bytes_read": 50, "read_s": 0.5, "variant": "int4"}
    cache.waits.time_read(Borrowed(ExpertKey(0, 1), 0, 0, 0, 50, {}, **small))
    assert (cache.waits.read_s, cache.waits.read_s_per_byte) == (0.0, 0.01)
    cache.waits.time_read(Borrowed(ExpertKey(0, 2), 0, 0, 0, 100, {}, 100, 2.0))
    assert cache.waits.read_s == 2.0 and cache.waits.read_s_per_byte == pytest.approx(0.011)
