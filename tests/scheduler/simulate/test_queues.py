"""Policies with queues of their own see events, not uses: hits first, by number, nothing pinned
goes.

Planted faults seen red: a lookup after the event's first miss, the order of the trace passed on,
one policy a layer where a pool has one for all.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policy.arc import Arc
from scheduler.policy.lecar import LeCar
from scheduler.policy.s3fifo import S3Fifo
from scheduler.simulate.queues import QueueCache, QueuePolicy, oldest
from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import trace_of, traces


class Witness:
    """Holds everything from the second use on; tells what it was told."""

    def __init__(self, resident: Collection[int]) -> None:
        self.resident = set(resident)
        self.told: list[str] = []

    def __contains__(self, key: int) -> bool:
        return key in self.resident

    def hit(self, key: int) -> None:
        self.told.append(f"hit {key}")

    def miss(self, key: int, pinned: Collection[int]) -> None:
        assert set(pinned) >= {key}
        self.resident.clear()
        self.told.append(f"miss {key}")


def test_hits_are_decided_before_anything_changes() -> None:
    witness = Witness({1, 3})
    cache = QueueCache(lambda _: witness, (1, 8), pooled=False)
    event = next(trace_of([[[5, 3, 4, 1]]], 8).events())
    assert cache.step(event).tolist() == [[False, True, False, True]]
    assert witness.told == ["hit 1", "hit 3", "miss 4", "miss 5"]


def test_a_pool_is_one_policy_for_the_places_of_all_layers() -> None:
    made: list[Witness] = []

    def make(layer: int) -> QueuePolicy:
        made.append(Witness(set()))
        return made[-1]

    event = next(trace_of([[[5], [5]]], 8).events())
    QueueCache(make, (2, 8), pooled=True).step(event)
    QueueCache(make, (2, 8), pooled=False).step(event)
    assert [witness.told for witness in made] == [["miss 5", "miss 13"], ["miss 5"], ["miss 13"]]


def test_oldest_is_the_first_that_is_not_pinned() -> None:
    assert oldest([3, 1, 2], pinned=[3]) == 1
    assert oldest([3], pinned=[3]) is None


@pytest.mark.parametrize("make", [Arc, S3Fifo, LeCar])
@settings(deadline=None)
@given(trace=traces(max_layers=1, max_experts=8, max_top_k=4, max_steps=40), data=st.data())
def test_holds_the_event_and_no_more_than_its_slots(
    make: type[Arc | S3Fifo | LeCar], trace: AccessTrace, data: st.DataObject
) -> None:
    slots = data.draw(st.integers(trace.top_k, trace.num_experts))
    policy = make(slots)
    cache = QueueCache(lambda _: policy, trace.shape, pooled=False)
    everyone = range(trace.num_experts)
    seen: set[int] = set()
    for event in trace.events():
        used = set(event.topk_ids[0].tolist())
        resident = {expert for expert in everyone if expert in policy}
        hits = cache.step(event)[0]
        assert hits.tolist() == np.isin(event.topk_ids[0], list(resident)).tolist()
        after = {expert for expert in everyone if expert in policy}
        seen |= used
        assert used <= after <= resident | used
        assert len(after) == min(slots, len(seen)), "nothing goes without need"
