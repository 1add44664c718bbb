"""What each expert is doing, asked from another thread than the one that computes.

Planted faults seen red: a used expert that was evicted counts as used, a guess hides that its
expert has come, a read that is under way is left out.
"""

from __future__ import annotations

import statistics
import threading
import time

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.face.heat import expert_states
from compute_node.predict.foresight import Foresight
from proto import compute_node_pb2 as pb
from proto.expert import ExpertKey, RecordKey
from tests.fakes import FakeLender, make_capacity

LAYERS, NUM_EXPERTS = (1, 3), 16
NAMES = {
    pb.EXPERT_STATE_RESIDENT: "resident",
    pb.EXPERT_STATE_USED: "used",
    pb.EXPERT_STATE_READ: "read",
    pb.EXPERT_STATE_FORESEEN: "foreseen",
}


def make_cache(layers: tuple[int, ...], num_experts: int, slots: int) -> ExpertCache:
    chooser = PolicyChooser("lru", 16.0, layers, num_experts, lambda: None)
    cache = ExpertCache(FakeLender(slots), make_capacity(slots, layers, 2, True), chooser)
    cache.open()
    return cache


def step(cache: ExpertCache, layer: int, *experts: int) -> None:
    for _ in cache.step(layer, experts)[1]:
        pass


def named(states: dict[int, bytearray]) -> dict[int, dict[int, str]]:
    return {
        layer: {expert: NAMES[state] for expert, state in enumerate(row) if state}
        for layer, row in states.items()
    }


def test_each_state() -> None:
    cache, foresight = make_cache(LAYERS, NUM_EXPERTS, 4), Foresight()
    step(cache, 1, 0, 1)
    step(cache, 3, 5, 6)
    step(cache, 1, 2)
    cache.room.under_way.add(RecordKey.exact(3, 9))
    for key in (ExpertKey(3, 8), ExpertKey(3, 9), ExpertKey(3, 5)):
        foresight.guessed(key, "map", 1)
    found = named(expert_states(cache, foresight, NUM_EXPERTS))
    gone = {0, 1} - found[1].keys()
    assert len(gone) == 1, "one went for the fifth, and is shown nowhere"
    assert found[1] == {({0, 1} - gone).pop(): "resident", 2: "used"}
    assert found[3] == {5: "used", 6: "used", 8: "foreseen", 9: "read"}


def test_what_was_used_and_went_is_not_there() -> None:
    cache = make_cache(LAYERS, NUM_EXPERTS, 4)
    step(cache, 1, 0, 1)
    cache.give_up([ExpertKey(1, 0)])
    assert named(expert_states(cache, Foresight(), NUM_EXPERTS))[1] == {1: "used"}


def test_nothing_breaks_while_the_cache_changes() -> None:
    layers = tuple(range(8))
    cache, foresight = make_cache(layers, 128, 256), Foresight()
    stop = threading.Event()

    def compute() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            step(cache, number % 8, *((number * 7 + n) % 128 for n in range(8)))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        looks = [expert_states(cache, foresight, 128) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(sum(map(bool, row)) <= 128 for look in looks for row in look.values())


def test_a_look_is_cheap() -> None:
    """48 x 128, three quarters resident: 0.6 ms on a quiet machine, hence the bound."""
    layers = tuple(range(48))
    cache = make_cache(layers, 128, 48 * 96)
    for layer in layers:
        step(cache, layer, *range(96))
    times_s = []
    for _ in range(20):
        start_s = time.perf_counter()
        expert_states(cache, Foresight(), 128)
        times_s.append(time.perf_counter() - start_s)
    assert statistics.median(times_s) < 5e-3
