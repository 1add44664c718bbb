"""What is held, in whose slots, and what would go for room.

Planted faults seen red: a small record counted as a slot of its own, an evicted one's part kept,
small records given up though their slot stays bound, what is replaced kept.
"""

from __future__ import annotations

from compute_node.cache.occupancy import Coming
from compute_node.cache.policies.lru import Lru
from compute_node.cache.residents import Residents, Wanted
from compute_node.store.memory import Borrowed
from proto.expert import EXACT_VARIANT, ExpertKey

A, B, C, D, E = (ExpertKey(0, expert) for expert in range(5))
OTHER = ExpertKey(1, 0)


def record(key: ExpertKey, slot: int, variant: str = EXACT_VARIANT) -> Borrowed:
    return Borrowed(key, slot, 0, 0, 100, {}, variant=variant)


def of_exact() -> Residents:
    residents = Residents([0, 1])
    for slot, key in enumerate((A, B, OTHER, D)):
        residents.insert(record(key, slot))
    return residents


def mixed() -> Residents:
    """Least recent first: small A and small B in slots 5 and 6, with C and E beside them, exact D;
    two parts a slot.
    """
    residents = Residents([0], num_parts=2)
    for key, slot in ((A, 5), (B, 6), (C, 5), (E, 6)):
        residents.insert(record(key, slot, "int4"))
    residents.insert(record(D, 0))
    return residents


def lru_of(*keys: ExpertKey) -> Lru:
    policy = Lru()
    for key in keys:
        policy.on_step(0, [key])
    return policy


def going(
    residents: Residents, policy: Lru, coming: Coming, num_slots: int
) -> tuple[list[ExpertKey], int]:
    return residents.victims(policy, Wanted(coming, num_slots))


def test_as_few_go_as_make_room() -> None:
    residents = of_exact()
    for num_coming, count in [(0, 0), (1, 1), (2, 2), (4, 4)]:
        assert going(residents, Lru(), Coming(num_coming), 4) == ([A, B, D, OTHER][:count], 0)
    assert going(residents, Lru(), Coming(5), 4) == ([A, B, D, OTHER], 1), "one too many"
    assert residents.victims(Lru(), Wanted(Coming(1), 4), pinned=[A]) == ([B], 0)
    assert residents.victims(Lru(), Wanted(Coming(1), 1, layer=1)) == ([OTHER], 0)


def test_slots_come_and_go_with_experts() -> None:
    residents = of_exact()
    assert residents.occupancy().slots_with(Coming()) == 4 == len(residents)
    residents.evict([A])
    assert residents.occupancy().slots_with(Coming()) == 3 == len(residents)
    assert residents.occupancy(0).slots_with(Coming()) == 2
    residents.clear()
    assert residents.occupancy().slots_with(Coming()) == 0 == len(residents)


def test_small_records_share_slots() -> None:
    held = mixed().occupancy()
    assert held.slots_with(Coming()) == 3, "two divided ones, one exact record"
    assert held.slots_with(Coming(num_small=1)) == 4, "both are full"
    assert held.slots_with(Coming(num_small=3)) == 5
    held.remove(record(A, 5, "int4"))
    assert held.slots_with(Coming(num_small=1)) == 3, "beside C"


def test_a_small_miss_takes_a_part_of_what_goes() -> None:
    policy = lru_of(A, B, C, D, E)
    assert going(mixed(), policy, Coming(num_small=1), 3) == ([A], 0)
    assert going(mixed(), policy, Coming(num_small=2), 3) == ([A, B], 0)
    policy = lru_of(D, A, B, C, E)
    assert going(mixed(), policy, Coming(num_small=2), 3) == ([D], 0), "a slot is two parts"


def test_small_ones_go_for_an_exact_miss_only_where_they_free_a_slot() -> None:
    policy = lru_of(A, B, C, D, E)
    assert going(mixed(), policy, Coming(1), 3) == ([A, C], 0), "B's slot stays bound by E"
    policy = lru_of(A, B, D, C, E)
    assert going(mixed(), policy, Coming(1), 3) == ([D], 0), "A and B made no room"


def test_what_is_replaced_goes_and_its_part_counts() -> None:
    wanted = Wanted(Coming(1), 4, replaced=[E])
    assert mixed().victims(lru_of(A, B, C, D, E), wanted) == ([E], 0), "a slot was free"
    wanted = Wanted(Coming(1), 3, replaced=[E])
    assert mixed().victims(lru_of(B, A, C, D, E), wanted) == ([E, B], 0), "both of one slot"


def test_where_slots_are_not_shared_a_small_record_counts_like_an_exact_one() -> None:
    residents = Residents([0], num_parts=1)
    residents.insert(record(A, 0, "int4"))
    residents.insert(record(B, 1))
    assert residents.occupancy().slots_with(Coming(num_small=1)) == 3
    assert residents.occupancy(0).slots_with(Coming(1)) == 3
    assert residents.victims(lru_of(A, B), Wanted(Coming(1), 2, layer=0)) == ([A], 0)
