"""MIN as the stream comes, against Belady's optimum replayed with the future known.

Planted faults seen red: a slot given up at the event of the last use instead of before it; the
oldest free slot taken instead of the newest; the event's own experts not taken off the capacity; a
use in the very next step that needs a slot.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from scheduler.shadow.optimum import Optimum
from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import misses, recorded, traces


def online_misses(trace: AccessTrace, slots: int, scope: str) -> int:
    """slots: a layer; a pool has as many in all."""
    capacities = [slots * trace.num_layers] if scope == "pool" else [slots] * trace.num_layers
    optimum = Optimum(trace.shape, trace.top_k, capacities)
    return sum(int(np.count_nonzero(~optimum.step(ids))) for ids in trace.topk_ids)


@pytest.mark.parametrize("scope", ["layer", "pool"])
@settings(max_examples=200, deadline=None)
@given(trace=traces(max_steps=25))
def test_as_many_misses_as_belady_at_every_end(trace: AccessTrace, scope: str) -> None:
    for slots in range(trace.top_k, trace.num_experts):
        assert online_misses(trace, slots, scope) == misses("min", trace, slots, scope)


@pytest.mark.parametrize("scope", ["layer", "pool"])
@pytest.mark.parametrize("slots", [4, 8, 12, 16, 31])
def test_as_many_misses_as_belady_on_a_recorded_trace(slots: int, scope: str) -> None:
    """Red when the window forgets, or is counted from another step than Belady's."""
    trace = recorded()
    optimum = online_misses(trace, slots, scope)
    assert optimum == misses("min", trace, slots, scope)
    assert optimum <= min(misses(name, trace, slots, scope) for name in ("lru", "decayed"))


def test_what_is_used_in_the_next_step_needs_no_slot_of_its_own() -> None:
    optimum = Optimum((1, 4), 2, [2])
    steps = [[[0, 1]], [[1, 2]], [[2, 0]]]
    hits = [optimum.step(np.array(ids, np.uint16)).tolist() for ids in steps]
    assert hits == [[[False, False]], [[True, False]], [[True, False]]]
