"""Planted faults seen red: shares counted from the wrong box, every layer begun with the same box,
a box that never joined given experts.
"""

from __future__ import annotations

from collections import Counter

import pytest

from compute_node.boxes.owners import Rotation, Shares
from proto.expert import ExpertKey


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
