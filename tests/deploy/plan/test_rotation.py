"""Planted faults seen red: a buffer free before its layer was computed, a read that begins before
its name, disks of a group read one after another, what hits read in part.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.plan.rotation import Rotation

# A layer takes 10 ms without waiting, and its experts 40 ms to read.
ROTATION = Rotation(
    num_layers=24,
    top_k=4,
    expert_bytes=2e6,
    disk_bytes_per_s=200e6,
    dense_s=0.004,
    expert_s=0.001,
    link_s=0.002,
    named_s=0.0005,
    token_s=0.0,
    slots=8,
)


def test_one_worker_is_as_fast_as_its_disk() -> None:
    disk_s = 24 * 0.040
    assert disk_s <= ROTATION.seconds(1, knows_next=True) < 1.03 * disk_s


def test_enough_groups_read_while_others_compute() -> None:
    """The condition of OD-MoE: a group's layer is read in the time of all groups' layers."""
    assert ROTATION.ideal_s() == pytest.approx(0.24)
    assert ROTATION.seconds(5, knows_next=True) == pytest.approx(0.24, rel=0.02)
    assert ROTATION.seconds(3, knows_next=True) > 0.3
    assert ROTATION.enough() == 4
    assert replace(ROTATION, disk_bytes_per_s=20e6).enough() is None, "24 layers, 40 would do"


def test_a_token_that_nobody_foresaw_waits_for_its_first_layers() -> None:
    waits_s = ROTATION.seconds(5) - ROTATION.seconds(5, knows_next=True)
    assert 0.03 < waits_s < 0.08


def test_one_buffer_cannot_be_read_into_while_it_is_computed_with() -> None:
    tight = replace(ROTATION, slots=4)
    assert tight.seconds(4, knows_next=True) > 1.05 * ROTATION.seconds(4, knows_next=True)


def test_a_group_shares_a_layers_reads() -> None:
    assert ROTATION.seconds(2, 2, True) < 0.7 * ROTATION.seconds(2, 1, True)


def test_a_late_shadow_is_no_help_and_holds_nobody_up() -> None:
    """Planted fault seen red: a read that waits for a name when the router has spoken."""
    late = replace(ROTATION, named_s=1.0)
    assert late.seconds(8) == pytest.approx(24 * 0.05)
    assert late.enough(knows_next=False) is None


def test_an_expert_is_read_whole_or_not_at_all() -> None:
    """Half of the experts read is slower than half of each: layers differ in what they miss."""
    for knows_next in (True, False):
        all_read_s = ROTATION.seconds_with_hits(4, 1.0, knows_next)
        assert all_read_s == pytest.approx(ROTATION.seconds(4, 1, knows_next), rel=0.02)
        assert ROTATION.seconds_with_hits(4, 0.0, knows_next) == pytest.approx(ROTATION.ideal_s())
    half = replace(ROTATION, expert_bytes=ROTATION.expert_bytes / 2)
    even_s, whole_s = half.seconds(2, 1, True), ROTATION.seconds_with_hits(2, 0.5, True)
    assert 1.02 * even_s < whole_s < 1.5 * even_s
    assert whole_s < ROTATION.seconds_with_hits(2, 0.6, True)
