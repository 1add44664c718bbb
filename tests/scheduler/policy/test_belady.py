"""Nobody misses less than MIN: every way to evict is tried on traces small enough for that.

Planted faults seen red: next uses in a pool told apart by their step alone, a use taken for
the next one after itself, the last step not looked at.
"""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.lab.policies import POLICIES
from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import misses, recorded, traces

Keys = frozenset[int]


def fewest_misses(events: list[Keys], capacity: int) -> int:
    """Of all ways to evict, event by event. Keeping more than must go never hurts, so only as many
    as must go do.
    """
    best: dict[Keys, int] = {frozenset(): 0}
    for event in events:
        following: dict[Keys, int] = {}
        for resident, missed in best.items():
            missed += len(event - resident)
            held = resident | event
            for going in combinations(held - event, max(0, len(held) - capacity)):
                kept = held - frozenset(going)
                following[kept] = min(missed, following.get(kept, missed))
        best = following
    return min(best.values())


def events_of(trace: AccessTrace, pooled: bool) -> list[list[Keys]]:
    """One sequence a layer, or one of all layers."""
    by_layer = [
        [frozenset(layer * trace.num_experts + e for e in step[layer]) for step in trace.topk_ids]
        for layer in range(trace.num_layers)
    ]
    return (
        [[event for step in zip(*by_layer, strict=True) for event in step]] if pooled else by_layer
    )


SMALL = traces(max_layers=2, max_experts=5, max_top_k=3, max_steps=9)


@settings(max_examples=200, deadline=None)
@given(SMALL, st.data(), st.booleans())
def test_min_is_the_fewest_of_all_ways(
    trace: AccessTrace, data: st.DataObject, pooled: bool
) -> None:
    slots = data.draw(st.integers(trace.top_k, trace.num_experts - 1))
    capacity = slots * trace.num_layers if pooled else slots
    fewest = sum(fewest_misses(events, capacity) for events in events_of(trace, pooled))
    assert misses("min", trace, slots, "pool" if pooled else "layer") == fewest


@settings(deadline=None)
@given(traces(max_steps=30, max_experts=8), st.data(), st.sampled_from(["layer", "pool"]))
def test_no_policy_misses_less(trace: AccessTrace, data: st.DataObject, scope: str) -> None:
    slots = data.draw(st.integers(trace.top_k, trace.num_experts - 1))
    fewest = misses("min", trace, slots, scope)
    for name in POLICIES:
        assert misses(name, trace, slots, scope) >= fewest, name


def test_on_a_recorded_trace_a_pool_may_do_with_less() -> None:
    trace = recorded()
    assert misses("min", trace, 12, "pool") == 577 < misses("min", trace, 12) == 772
