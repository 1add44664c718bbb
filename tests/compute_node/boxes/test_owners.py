"""Planted faults seen red: shares counted from the wrong box, every layer begun with the same box,
a box that never joined given experts.
"""

from __future__ import annotations

from collections import Counter

import pytest

from compute_node.boxes.owners import Rotation, Shares
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS, HeldExperts


@pytest.mark.parametrize("slots", [(10,), (10, 10), (64, 64, 64, 64), (96, 32), (50, 7, 3)])
def test_boxes_own_as_large_shares_as_they_have_slots(slots: tuple[int, ...]) -> None:
    owners = Shares(32, slots)
    counts = Counter(
        _owner(owners, ExpertKey(layer, expert)) for layer in range(24) for expert in range(32)
    )
    for box, num_slots in enumerate(slots):
        assert counts[box] / (24 * 32) == pytest.approx(num_slots / sum(slots), abs=0.04)
    in_layer = Counter(_owner(owners, ExpertKey(3, expert)) for expert in range(32))
    for box, num_slots in enumerate(slots):
        assert abs(in_layer[box] - 32 * num_slots / sum(slots)) <= 1


def test_layers_begin_with_different_boxes() -> None:
    owners = Shares(8, (5, 5))
    assert len({_owner(owners, ExpertKey(layer, 0)) for layer in range(4)}) == 2


def test_a_box_without_slots_owns_nothing() -> None:
    owners = Shares(8, (5, 0, 5))
    assert {_owner(owners, ExpertKey(1, expert)) for expert in range(8)} == {0, 2}


def _owner(owners: Shares, key: ExpertKey) -> int:
    [owner] = owners.owners(key)
    return owner


def test_groups_take_layers_in_turn_and_share_a_layer() -> None:
    """Planted faults seen red: the main node in a group, a box without slots in one."""
    owners = Rotation((1, 2, 3, 5), (9, 4, 4, 0, 4, 4), 2)
    assert (
        sorted(owners.owners(ExpertKey(1, 0))) == sorted(owners.owners(ExpertKey(3, 7))) == [1, 4]
    )
    assert (
        sorted(owners.owners(ExpertKey(2, 0))) == sorted(owners.owners(ExpertKey(5, 7))) == [2, 5]
    )
    firsts = Counter(owners.owners(ExpertKey(5, expert))[0] for expert in range(8))
    assert firsts == {2: 4, 5: 4}


@pytest.mark.parametrize(("slots", "groups"), [((9,), 4), ((9, 0), 1), ((9, 4), 4)])
def test_a_rotation_of_few_boxes(slots: tuple[int, ...], groups: int) -> None:
    owners = Rotation((0, 1), slots, groups)
    assert list(owners.owners(ExpertKey(1, 3))) == [1] * (slots[-1] == 4)


def held(*experts: range) -> list[HeldExperts]:
    """The main node has all; each further box has these of every layer."""
    keys = [frozenset(ExpertKey(layer, e) for layer in range(8) for e in one) for one in experts]
    return [ALL_EXPERTS, *map(HeldExperts, keys)]


def test_an_expert_is_given_to_boxes_that_have_it_in_proportion_to_their_slots() -> None:
    """Written against: shares made among all boxes, a box with half of the experts given
    half of what its slots are worth.
    """
    stores = held(range(16), range(16, 32))
    owners = Shares(32, (8, 8, 8), stores)
    counts = Counter[int]()
    for layer in range(8):
        for expert in range(32):
            owner = _owner(owners, ExpertKey(layer, expert))
            assert ExpertKey(layer, expert) in stores[owner]
            counts[owner] += 1
    assert all(count == pytest.approx(256 / 3, abs=6) for count in counts.values()), counts


def test_where_all_have_all_shares_are_as_before() -> None:
    for slots in [(10, 10), (96, 32), (50, 7, 3)]:
        plain, among = Shares(32, slots), Shares(32, slots, [ALL_EXPERTS] * len(slots))
        keys = [ExpertKey(layer, expert) for layer in range(9) for expert in range(32)]
        assert [plain.owners(key) for key in keys] == [among.owners(key) for key in keys]
    first = [_owner(Shares(8, (5, 5)), ExpertKey(0, expert)) for expert in range(8)]
    assert first == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_the_main_node_lacks_has_stand_ins() -> None:
    """Written against: the main node stands in for a box though it lacks the expert."""
    _, *others = held(range(8), range(4, 12), range(12))
    owners = Shares(16, (8, 8, 8, 8), [HeldExperts(frozenset()), *others])
    assert sorted(owners.owners(ExpertKey(1, 0))) == [1, 3]
    assert sorted(owners.owners(ExpertKey(1, 5))) == [1, 2, 3]
    assert len({owners.owners(ExpertKey(1, expert))[0] for expert in range(12)}) == 3
    assert owners.owners(ExpertKey(1, 15)) == ()


def test_a_rotation_passes_over_boxes_without_the_expert() -> None:
    """Written against: the group asked whatever it has."""
    stores = held(range(16), range(8), range(8, 16), range(8))
    owners = Rotation((1, 2), (9, 4, 4, 4, 4), 2, stores)
    assert sorted(owners.owners(ExpertKey(1, 0))) == [1]
    assert sorted(owners.owners(ExpertKey(1, 9))) == [1, 3]
    assert sorted(owners.owners(ExpertKey(2, 0))) == [2, 4]
    assert list(owners.owners(ExpertKey(2, 9))) == [], "the main node computes it"
    owners = Rotation((1, 2), (9, 4, 4, 4, 4), 2, [HeldExperts(frozenset()), *stores[1:]])
    assert list(owners.owners(ExpertKey(2, 9))) == [1, 3], "another group does"
