"""Our policies against those of libcachesim, written by others, on sequences of single uses.

There an event is one use, so event-atomic and classic are the same thing. Equal counts are asked of
LRU, ARC, S3-FIFO and MIN. Not of the others, for these reasons:

- LFU: theirs forgets a count when it evicts, ours keeps it (EVIDENCE: the weak in-cache LFU is a
  straw man), and they break ties by age, we by number.
- LFRU, decayed: it has none.
- LeCaR: it draws its lots from a generator of its own, keeps one history for both experts, and its
  LFU forgets counts. With every lot LRU's it must be LRU, which is asked.
- S3-FIFO fills an empty cache in another way: theirs puts a tenth into the small queue and the
  rest into the main one, the paper puts all into the small one. Ours is filled their way first.

Planted faults seen red: the target of ARC rounded down, S3-FIFO's main queue giving one more round
whatever the count, an LRU that tells only every other step apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import libcachesim
import numpy as np
import pytest

from scheduler.policy.lecar import LeCar
from scheduler.policy.s3fifo import S3Fifo
from scheduler.simulate.queues import QueuePolicy
from tests.scheduler.replays import misses, recorded, trace_of

Uses = list[int]
NEVER = 2**62


def recorded_uses() -> Uses:
    """The first chosen expert of every layer and step, a layer after another."""
    first: Uses = recorded().topk_ids[:, :, 0].T.ravel().tolist()
    return first


def skewed_uses() -> Uses:
    random = np.random.default_rng(0)
    drawn: Uses = (random.zipf(1.2, 5000) % 150).tolist()
    return drawn


SEQUENCES = {"recorded": recorded_uses, "skewed": skewed_uses}


def their_misses(make: Callable[..., libcachesim.CacheBase], uses: Uses, slots: int) -> int:
    cache = make(cache_size=slots, hashpower=10)
    count = 0
    for time, (key, following) in enumerate(zip(uses, next_uses(uses), strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size = key + 1, 1
        request.clock_time, request.next_access_vtime = time, following
        count += not cache.get(request)
    return count


def next_uses(uses: Uses) -> list[int]:
    last: dict[int, int] = {}
    following = []
    for at in reversed(range(len(uses))):
        following.append(last.get(uses[at], NEVER))
        last[uses[at]] = at
    return following[::-1]


def our_misses(policy: QueuePolicy, uses: Sequence[int]) -> int:
    count = 0
    for key in uses:
        if key in policy:
            policy.hit(key)
        else:
            count += 1
            policy.miss(key, [key])
    return count


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("slots", [3, 6, 12, 20])
@pytest.mark.parametrize(("ours", "theirs"), [("lru", "LRU"), ("arc", "ARC"), ("min", "Belady")])
def test_equal_misses(ours: str, theirs: str, slots: int, sequence: str) -> None:
    uses = SEQUENCES[sequence]()
    trace = trace_of([[[key]] for key in uses], num_experts=max(uses) + 1)
    assert misses(ours, trace, slots) == their_misses(getattr(libcachesim, theirs), uses, slots)


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("slots", [20, 25, 40])
def test_equal_misses_of_s3fifo_filled_their_way(slots: int, sequence: str) -> None:
    """20 is the smallest that theirs takes: its small queue holds nothing as large as itself."""
    uses = SEQUENCES[sequence]()
    policy = S3Fifo(slots)
    at = filled = 0
    while len(policy._small) + len(policy._main) < slots and at < len(uses):
        if uses[at] in policy:
            policy.hit(uses[at])
        else:
            (policy._small if filled < int(0.1 * slots) else policy._main)[uses[at]] = 0
            filled += 1
        at += 1
    ours = filled + our_misses(policy, uses[at:])
    assert ours == their_misses(libcachesim.S3FIFO, uses, slots)


class AlwaysLru:
    def random(self) -> float:
        return -1.0


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("slots", [3, 12])
def test_lecar_with_every_lot_for_lru_is_lru(slots: int, sequence: str) -> None:
    uses = SEQUENCES[sequence]()
    policy = LeCar(slots)
    policy._lots = AlwaysLru()  # type: ignore[assignment]
    assert our_misses(policy, uses) == their_misses(libcachesim.LRU, uses, slots)
