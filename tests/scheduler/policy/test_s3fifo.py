"""S3-FIFO's queues on sequences small enough to follow by hand.

Planted faults seen red: one use promotes, a ghost comes back to the small queue, the main queue
evicts what was used.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.policy.s3fifo import S3Fifo


def use(policy: S3Fifo, keys: Iterable[int]) -> None:
    for key in keys:
        if key in policy:
            policy.hit(key)
        else:
            policy.miss(key, [key])


def resident(policy: S3Fifo) -> set[int]:
    return {key for key in range(100) if key in policy}


def test_what_is_used_once_more_leaves_and_twice_more_stays() -> None:
    policy = S3Fifo(4)
    use(policy, [0, 1, 2, 3, 0, 1, 1])
    use(policy, [4])
    assert resident(policy) == {1, 2, 3, 4}
    use(policy, [5, 6])
    assert resident(policy) == {1, 4, 5, 6}, "1 went to the main queue"
    use(policy, [7, 8, 9])
    assert resident(policy) == {1, 7, 8, 9}, "the small queue gives while it has its share"


def test_a_ghost_comes_back_to_the_main_queue() -> None:
    policy = S3Fifo(4)
    use(policy, [0, 1, 2, 3, 4])
    use(policy, [0])
    use(policy, [5, 6, 7, 8])
    assert 0 in policy, "a stranger would have left the small queue by now"


def test_the_main_queue_gives_what_was_used_another_round() -> None:
    policy = S3Fifo(4)
    use(policy, [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3])
    use(policy, [4])
    assert resident(policy) == {1, 2, 3, 4}, "all moved to the main queue, its oldest went"
    use(policy, [1, 0])
    assert resident(policy) == {0, 1, 2, 3}, "the small queue held its one slot, and gave it"
    use(policy, [4])
    assert resident(policy) == {1, 2, 3, 4}, "again; 4 is a ghost, so it came to the main queue"
    use(policy, [5])
    assert resident(policy) == {1, 3, 4, 5}, "1 was used since, so 2 went"


def test_takes_from_the_other_queue_when_all_of_one_is_pinned() -> None:
    policy = S3Fifo(3)
    use(policy, [0, 0, 0, 1, 2, 3])
    assert resident(policy) == {0, 2, 3}
    policy.miss(4, [2, 3, 4])
    assert resident(policy) == {2, 3, 4}
