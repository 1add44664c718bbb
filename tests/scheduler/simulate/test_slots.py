"""Room is made as a plain simulation with sets makes it, one event after another.

Planted faults seen red: an expert of the event evicted, by layer and in a pool; a pool that goes by
ranks of after an event before its turn; an expert evicted before its turn still counted as a hit.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scheduler.simulate import slots as slots_module
from scheduler.simulate.slots import LayerSlots, SlotsTooFew, make_slots
from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import traces

Ranks = NDArray[np.float64]
Key = tuple[int, int]


class PlainSlots:
    """The same, key by key."""

    def __init__(self, capacity: int, pooled: bool) -> None:
        self._capacity = capacity
        self._pooled = pooled
        self._resident: set[Key] = set()

    def step(self, topk_ids: list[list[int]], before: Ranks, after: Ranks) -> list[list[bool]]:
        hits = []
        for layer, experts in enumerate(topk_ids):
            event = {(layer, expert) for expert in experts}
            hits.append([(layer, expert) in self._resident for expert in experts])
            self._resident |= event
            rivals = {key for key in self._resident if self._pooled or key[0] == layer}

            def rank(key: Key, layer: int = layer) -> tuple[float, Key]:
                return float((after if key[0] <= layer else before)[key]), key

            excess = max(0, len(rivals) - self._capacity)
            self._resident -= set(sorted(rivals - event, key=rank)[:excess])
        return hits


def random_ranks(trace: AccessTrace, levels: int, seed: int) -> list[Ranks]:
    """One more than steps. Few levels make ties, -inf among them."""
    random = np.random.default_rng(seed)
    ranks = random.integers(0, levels, (trace.num_steps + 1, *trace.shape)).astype(float)
    ranks[ranks == 0] = -np.inf
    return list(ranks)


@settings(deadline=None)
@given(traces(max_steps=20), st.data(), st.integers(2, 20), st.integers(0, 1000), st.booleans())
def test_makes_room_as_plain_sets_do(
    trace: AccessTrace, data: st.DataObject, levels: int, seed: int, pooled: bool
) -> None:
    slots = data.draw(st.integers(trace.top_k, trace.num_experts))
    real = make_slots(trace.shape, trace.top_k, slots, pooled=pooled)
    plain = PlainSlots(slots * trace.num_layers if pooled else slots, pooled)
    ranks = random_ranks(trace, levels, seed)
    for step, topk_ids in enumerate(trace.topk_ids):
        got = real.step(topk_ids, ranks[step], ranks[step + 1])
        assert got.tolist() == plain.step(topk_ids.tolist(), ranks[step], ranks[step + 1])


def test_what_the_event_uses_stays_however_low_it_ranks() -> None:
    slots = LayerSlots((1, 4), 2)
    ranks = np.array([[-9.0, -8.0, 0.0, 1.0]])
    first = np.array([[2, 3]], np.uint16)
    assert not slots.step(first, ranks, ranks).any()
    assert slots.step(np.array([[0, 2]], np.uint16), ranks, ranks).tolist() == [[False, True]]
    assert slots.step(np.array([[0, 2]], np.uint16), ranks, ranks).all()


def test_a_pool_may_take_an_expert_before_its_turn() -> None:
    """The second layer's expert makes room for the first's, and is a miss when it comes."""
    pool = make_slots((2, 4), 1, 1, pooled=True)
    ranks = np.array([[5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    assert pool.step(np.array([[0], [0]], np.uint16), ranks, ranks).tolist() == [[False], [False]]
    assert pool.step(np.array([[1], [0]], np.uint16), ranks, ranks).tolist() == [[False], [False]]


def test_layers_may_have_shares_of_their_own() -> None:
    slots = LayerSlots((2, 4), np.array([1, 3], np.intp))
    ranks = np.zeros((2, 4))
    for expert in (0, 1, 2):
        slots.step(np.array([[expert], [expert]], np.uint16), ranks, ranks)
    again = [slots.step(np.array([[e], [e]], np.uint16), ranks, ranks).ravel() for e in (2, 1, 0)]
    assert np.array(again).tolist() == [[True, True], [False, True], [False, True]]


@pytest.mark.parametrize("pooled", [False, True])
def test_too_few_slots_name_what_works(pooled: bool) -> None:
    with pytest.raises(SlotsTooFew, match="give at least 2"):
        make_slots((3, 8), 2, 1, pooled=pooled)
    make_slots((3, 8), 2, 2, pooled=pooled)


@pytest.mark.parametrize("candidates_per_miss", [0, 1])
def test_a_pool_looks_further_when_the_first_candidates_do_not_do(
    candidates_per_miss: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when somebody goes who ranks above what was looked at, or a second look counts twice."""
    monkeypatch.setattr(slots_module, "CANDIDATES_PER_MISS", candidates_per_miss)
    monkeypatch.setattr(slots_module, "SPARE_CANDIDATES", 0)
    random = np.random.default_rng(0)
    real, plain = make_slots((6, 16), 3, 5, pooled=True), PlainSlots(30, pooled=True)
    after = random.random((6, 16))
    for _ in range(300):
        topk_ids = random.random((6, 16)).argsort(axis=1)[:, :3].astype(np.uint16)
        before, after = after, np.round(random.random((6, 16)), 1)
        got = real.step(topk_ids, before, after)
        assert got.tolist() == plain.step(topk_ids.tolist(), before, after)
