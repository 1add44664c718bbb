"""Which recorded steps are replayed, and what the scheduler's own replay counts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from proto.redis_schema import POOL
from scheduler.policy.belady import Belady
from scheduler.policy.decayed import Decayed
from scheduler.policy.lfru import Lfru
from scheduler.policy.lfu import Lfu
from scheduler.policy.lru import Lru
from scheduler.shadow.shadows import ADVISED_LAG_STEPS, Capacity
from scheduler.simulate.ranking import RankingPolicy
from scheduler.simulate.replay import RankedCache
from scheduler.simulate.trace import AccessTrace, TraceInvalid
from tests.bench.scale.advice import Following, Told


@dataclass(frozen=True)
class Segment:
    """Recorded steps of some generations, one after another.

    warmup_steps: the first ones, which fill the cache and are not counted
    """

    trace: AccessTrace
    warmup_steps: int

    @property
    def num_counted(self) -> int:
        return self.trace.num_steps - self.warmup_steps


def segments(
    trace: AccessTrace, number: int, warmup_steps: int, counted_steps: int
) -> list[Segment]:
    """So many, of different generations.

    Raises TraceInvalid for a trace that is too short, or that has no gate weights.
    """
    if not trace.topk_weights.any():
        raise TraceInvalid(f"{trace.name} has no gate weights, so experts would weigh nothing")
    needed, found, first = warmup_steps + counted_steps, [], 0
    for _ in range(number):
        ends = trace.seq_offsets[first + 1 :] - trace.seq_offsets[first]
        long_enough = np.flatnonzero(ends >= needed)
        if not len(long_enough):
            raise TraceInvalid(f"{trace.name} has no {number} x {needed} steps: ask for fewer")
        following = first + int(long_enough[0]) + 1
        taken = trace.take(np.arange(first, following), trace.name)
        found.append(Segment(_first_steps(taken, needed), warmup_steps))
        first = following
    return found


def _first_steps(trace: AccessTrace, number: int) -> AccessTrace:
    kept = trace.seq_offsets[trace.seq_offsets < number]
    return replace(
        trace,
        topk_ids=trace.topk_ids[:number],
        topk_weights=trace.topk_weights[:number],
        seq_offsets=np.append(kept, number),
        seq_names=trace.seq_names[: len(kept)],
        router_scores=None,
    )


def ranking(name: str, segment: Segment, told: Mapping[str, Told]) -> tuple[RankingPolicy, int]:
    """A policy of the scheduler's, and how many steps late its ranks are."""
    trace = segment.trace
    if name in told:
        return Following(told[name]), ADVISED_LAG_STEPS
    if name == "min":
        return Belady(trace.topk_ids, trace.num_experts), 0
    local: dict[str, Callable[[tuple[int, int]], RankingPolicy]]
    local = {"lru": Lru, "lfu": Lfu, "lfru": Lfru, "decayed": Decayed}
    return local[name](trace.shape), 0


def replayed_hits(policy: RankingPolicy, lag_steps: int, segment: Segment, slots: int) -> list[int]:
    """Of each counted step, by the scheduler's shadows of one pool."""
    trace = segment.trace
    capacity = Capacity(trace.shape, trace.top_k, slots, POOL)
    cache = RankedCache(policy, capacity.empty_slots(), lag_steps)
    hits = [int(np.count_nonzero(cache.step(event))) for event in trace.events()]
    return hits[segment.warmup_steps :]


def rows(segment: Segment) -> Iterator[tuple[int, NDArray[np.uint16], NDArray[np.float16]]]:
    """Every step's number, experts and gate weights, both [L, K]."""
    trace = segment.trace
    yield from zip(range(trace.num_steps), trace.topk_ids, trace.topk_weights, strict=True)
