"""Planted faults seen red: shares counted from the wrong box, every layer begun with the same box,
a box that never joined given experts.
"""

from __future__ import annotations

from collections import Counter

import pytest

from compute_node.boxes.owners import Owners
from proto.expert import ExpertKey


@pytest.mark.parametrize("slots", [(10,), (10, 10), (64, 64, 64, 64), (96, 32), (50, 7, 3)])
def test_boxes_own_as_large_shares_as_they_have_slots(slots: tuple[int, ...]) -> None:
    owners = Owners(32, slots)
    counts = Counter(
        owners.owner(ExpertKey(layer, expert)) for layer in range(24) for expert in range(32)
    )
    for box, num_slots in enumerate(slots):
        assert counts[box] / (24 * 32) == pytest.approx(num_slots / sum(slots), abs=0.04)
    in_layer = Counter(owners.owner(ExpertKey(3, expert)) for expert in range(32))
    for box, num_slots in enumerate(slots):
        assert abs(in_layer[box] - 32 * num_slots / sum(slots)) <= 1


def test_layers_begin_with_different_boxes() -> None:
    owners = Owners(8, (5, 5))
    assert len({owners.owner(ExpertKey(layer, 0)) for layer in range(4)}) == 2


def test_a_box_without_slots_owns_nothing() -> None:
    owners = Owners(8, (5, 0, 5))
    assert {owners.owner(ExpertKey(1, expert)) for expert in range(8)} == {0, 2}
