"""What is held, by layer and by bytes, and what would go for room.

Planted faults seen red: each resident counted alike, an evicted one's bytes kept.
"""

from __future__ import annotations

from compute_node.cache.policies.lru import Lru
from compute_node.cache.residents import Residents
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey

SIZES = {ExpertKey(0, 0): 300, ExpertKey(0, 1): 100, ExpertKey(1, 0): 100, ExpertKey(1, 1): 50}


def filled() -> Residents:
    residents = Residents([0, 1])
    for key, size_bytes in SIZES.items():
        residents.insert(Borrowed(key, 0, 0, 0, size_bytes, {}))
    return residents


def test_as_few_go_as_make_room() -> None:
    residents, first, *others = filled(), *SIZES
    for excess_bytes, count in [(0, 0), (1, 1), (300, 1), (301, 2), (400, 2), (401, 3), (900, 4)]:
        assert residents.victims(Lru(), excess_bytes) == [first, *others][:count]
    assert residents.victims(Lru(), 1, pinned=[first]) == others[:1]
    assert residents.victims(Lru(), 120, layer=1) == others[1:]


def test_bytes_come_and_go_with_experts() -> None:
    residents = filled()
    assert (residents.held_bytes(), residents.held_bytes(1), len(residents)) == (550, 150, 4)
    residents.evict([ExpertKey(0, 0)])
    assert (residents.held_bytes(), residents.held_bytes(0), len(residents)) == (250, 100, 3)
    residents.clear()
    assert (residents.held_bytes(), len(residents)) == (0, 0)
