"""Planted faults seen red: what is resident all in the first, an expert in two portions."""

from __future__ import annotations

import pytest

from compute_node.moe.portions import portions


@pytest.mark.parametrize("most", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("resident", [set(), {2, 7}, set(range(12))])
def test_each_expert_is_in_one_portion_and_portions_compute_and_read_alike(
    most: int, resident: set[int]
) -> None:
    experts = list(range(0, 12))
    found = portions(experts, resident, most)
    assert sorted(expert for portion in found for expert in portion) == experts
    assert 1 <= len(found) <= most
    assert all(portion == sorted(portion) for portion in found)
    if most <= len(experts):
        for counts in (
            [len(portion) for portion in found],
            [len(set(portion) - resident) for portion in found],
        ):
            assert max(counts) - min(counts) <= 1
