"""Small records that are used often become exact ones, in free room and while nobody waits.

Planted faults seen red: an upgrade that takes the room of another expert, one begun while tokens
miss, a small record kept beside its exact one, an exact miss asked for twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from proto.expert import ExpertKey, RecordKey
from tests.fakes import FakeArrivals, FakeLender, make_capacity

PARTS = 3
SMALL = dict.fromkeys(range(64), "int4")


class SlowLender(FakeLender):
    """Exact records are ready only when `is_fast`."""

    is_fast = False

    def borrow(self, *args: Sequence[RecordKey], **more: object) -> FakeArrivals:
        arrivals = super().borrow(*args, **more)  # type: ignore[arg-type]
        arrivals.is_ready = lambda: self.is_fast  # type: ignore[method-assign]
        return arrivals


def make_cache(slots: int) -> tuple[ExpertCache, SlowLender]:
    lender = SlowLender(slots, num_parts=PARTS)
    chooser = PolicyChooser("decayed", 16.0, (0,), 64, lambda: None)
    cache = ExpertCache(lender, make_capacity(slots, (0,), 2, True, PARTS), chooser)
    cache.open()
    return cache, lender


def use(cache: ExpertCache, *experts: int, small: bool = True) -> set[int]:
    hits, waves = cache.step(0, experts, small=SMALL if small else {})
    assert sorted(b.key.expert for wave in waves for b in wave) == sorted(experts)
    return hits


def test_what_is_used_most_becomes_exact_one_by_one_in_free_room() -> None:
    cache, lender = make_cache(slots=3)
    lender.is_fast = True
    use(cache, 1, 2, 3)
    use(cache, 2)
    for _ in range(20):
        use(cache, 1, 2, 3)
    held = sorted(lender.held)
    assert held == [
        RecordKey.exact(0, 1),
        RecordKey.exact(0, 2),
        RecordKey(ExpertKey(0, 3), "int4"),
    ]
    assert cache.upgrades.num_done == 2, "the third has no room"


def test_nothing_is_upgraded_while_tokens_miss() -> None:
    cache, lender = make_cache(slots=8)
    lender.is_fast = True
    for expert in range(20):
        use(cache, 1, 2 + expert)
    assert all(key.variant == "int4" for key in lender.held)


def test_a_step_does_not_wait_for_an_upgrade_it_can_do_without() -> None:
    cache, lender = make_cache(slots=3)
    for _ in range(8):
        assert use(cache, 1) == {1} or not lender.is_fast
    assert len(lender.held) == 2 and ExpertKey(0, 1) not in cache, "still on its way"
    lender.is_fast = True
    use(cache, 1)
    assert list(lender.held) == [RecordKey.exact(0, 1)]


def test_who_needs_the_exact_record_waits_for_the_one_under_way() -> None:
    cache, lender = make_cache(slots=3)
    for _ in range(8):
        use(cache, 1)
    assert use(cache, 1, small=False) == {1}
    assert list(lender.held) == [RecordKey.exact(0, 1)]


def test_a_damaged_exact_record_leaves_the_small_one() -> None:
    cache, lender = make_cache(slots=3)
    lender.is_fast = True
    lender.damaged = {RecordKey.exact(0, 1)}
    for _ in range(20):
        use(cache, 1)
    assert list(lender.held) == [RecordKey(ExpertKey(0, 1), "int4")]
    assert sum(RecordKey.exact(0, 1) in acquires for _, acquires in lender.exchanges) == 1


def test_a_lost_session_takes_the_upgrade_with_it() -> None:
    cache, lender = make_cache(slots=3)
    for _ in range(8):
        use(cache, 1)
    lender.abort()
    use(cache, 1)
    assert not cache.room.under_way
    assert list(lender.held) == [RecordKey.exact(0, 1)], "the store had it in memory"
