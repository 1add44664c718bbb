"""ARC's cases on sequences small enough to follow by hand.

Planted faults seen red: a hit that stays in T1, the target moved the wrong way, a page of a full T1
remembered as a ghost.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.policy.arc import Arc


def use(policy: Arc, keys: Iterable[int]) -> list[int]:
    """Of those keys, one an event, the misses."""
    missed = []
    for key in keys:
        if key in policy:
            policy.hit(key)
        else:
            missed.append(key)
            policy.miss(key, [key])
    return missed


def resident(policy: Arc) -> set[int]:
    return {key for key in range(10) if key in policy}


def test_a_scan_leaves_what_was_used_twice() -> None:
    policy = Arc(3)
    use(policy, [0, 0, 1, 1, 2, 3, 4, 5])
    assert resident(policy) == {0, 1, 5}


def test_a_page_wanted_back_from_the_recent_makes_room_for_the_recent() -> None:
    """2 leaves T1 for B1; its return raises the target to 1, so T2 then gives up its oldest."""
    policy = Arc(3)
    use(policy, [0, 0, 1, 1, 2, 3])
    assert resident(policy) == {0, 1, 3}
    use(policy, [2])
    assert resident(policy) == {1, 2, 3}, "T1 has its target of one, so the oldest of T2 went"


def test_a_page_wanted_back_from_the_frequent_makes_room_for_the_frequent() -> None:
    """0 went from T2 to B2; its return lowers the target to 0, so T1 gives up its page."""
    policy = Arc(3)
    use(policy, [0, 0, 1, 1, 2, 3, 2])
    use(policy, [0])
    assert resident(policy) == {0, 1, 2}


def test_a_page_of_a_full_t1_is_forgotten() -> None:
    """With T1 at capacity B1 is empty and stays so: 0 comes back as a stranger, to T1."""
    policy = Arc(2)
    use(policy, [0, 1, 2, 0])
    assert resident(policy) == {0, 2}
    use(policy, [1, 3])
    assert resident(policy) == {1, 3}, "nothing was in T2"


def test_takes_from_the_other_queue_when_all_of_one_is_pinned() -> None:
    policy = Arc(3)
    use(policy, [0, 0, 1])
    policy.miss(2, [1, 2])
    policy.miss(3, [1, 2, 3])
    assert resident(policy) == {1, 2, 3}
