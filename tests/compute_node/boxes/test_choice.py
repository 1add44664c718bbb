"""Which box computes what, by what it costs.

Planted faults seen red: who has it in memory passed over, reads piled up on the owner, the way to a
box left out, an owner passed over for nothing or for a processor that is faster.
"""

from __future__ import annotations

from compute_node.boxes.choice import Side, Wanted, cheapest

SIDES = {0: Side(0.0, 1.0), 1: Side(0.5, 1.0), 2: Side(0.5, 1.0)}


def read_s(box: int, expert: int) -> float:
    return 10.0


def test_what_is_in_memory_is_computed_there_and_by_the_less_busy() -> None:
    wanted = [Wanted(1, [1], [0]), Wanted(2, [1, 2], [0]), Wanted(3, [1, 2], [0])]
    assert cheapest(wanted, SIDES, read_s) == {1: [1, 3], 2: [2]}


def test_reads_go_to_their_owner_until_another_disk_has_them_sooner() -> None:
    """By more than half a read: not for the way alone, nor for a faster processor."""
    wanted = [Wanted(e, [], [1, 0, 2]) for e in range(4)]
    fast = {**SIDES, 0: Side(0.0, 0.1)}
    assert cheapest(wanted[:1], fast, read_s) == {1: [0]}
    assert cheapest(wanted[:3], SIDES, read_s) == {1: [0], 0: [1], 2: [2]}
    found = cheapest(wanted, SIDES, read_s)
    assert {box: len(part) for box, part in found.items()} == {0: 1, 1: 2, 2: 1}


def test_a_slow_disk_and_a_long_way_read_less() -> None:
    slow = {0: Side(0.0, 1.0), 1: Side(50.0, 1.0), 2: Side(0.5, 1.0)}
    wanted = [Wanted(e, [], [1, 0, 2]) for e in range(4)]
    found = cheapest(wanted, slow, lambda box, expert: 30.0 if box == 2 else 10.0)
    assert {box: len(part) for box, part in found.items()} == {0: 3, 2: 1}


def test_a_coarse_record_of_the_own_disk_is_one_of_the_choices() -> None:
    """What it takes is less than an exact one elsewhere, for the expert that it will do for."""
    wanted = [Wanted(1, [], [1, 0]), Wanted(2, [], [1, 0])]
    found = cheapest(wanted, SIDES, lambda box, expert: 2.0 if (box, expert) == (0, 2) else 10.0)
    assert found == {1: [1], 0: [2]}


def test_busy_with_reading_it_reads_less() -> None:
    """And with computing it reads as much."""
    wanted = [Wanted(6, [], [1]), Wanted(7, [], [1, 2])]
    assert cheapest(wanted, SIDES, read_s) == {1: [6], 2: [7]}
    wanted = [Wanted(7, [], [1, 2]), *(Wanted(e, [1], []) for e in range(3))]
    assert cheapest(wanted, SIDES, read_s) == {1: [0, 1, 2, 7]}
