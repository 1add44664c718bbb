"""Guesses: which, when they pay, when they are withdrawn.

Planted faults seen red: residents guessed, right guesses withdrawn, no bound, one precision for all
ranks, guessing though it does not pay, never trying again, asking layers that never miss, no
correction after the sigmoid, guessed misses counted as unguessed, a hash router's weight asked.
"""

from __future__ import annotations

import pytest
import torch

from compute_node.predict.next_router import NextRouter, NextRouters
from compute_node.predict.predictor import Seen
from compute_node.predict.prefetcher import Prefetcher
from proto.expert import ExpertKey

LAYERS = (1, 3, 5, 7)
NUM_EXPERTS, TOP_K, READ_S, LAYER_S = 8, 2, 0.02, 0.01
HIDDEN = torch.eye(NUM_EXPERTS)  # row e makes every router choose e first, then e - 1


def router(bias: torch.Tensor | None = None, correction: torch.Tensor | None = None) -> NextRouter:
    weight = torch.eye(NUM_EXPERTS) + 0.5 * torch.eye(NUM_EXPERTS).roll(-1, 0)
    return NextRouter(weight, bias, correction)


class Node:
    """A prefetcher whose residents, clock and device a test sets."""

    def __init__(self, piece_s: float = 0.001, max_guesses: int = 8, max_depth: int = 2) -> None:
        self.resident: set[ExpertKey] = set()
        self.predictor = NextRouters({layer: router() for layer in LAYERS})
        self.prefetcher = Prefetcher(
            layers=tuple(LAYERS),
            predictor=self.predictor,
            top_k=TOP_K,
            resident=self.resident,
            read_s=lambda: READ_S,
            piece_s=lambda: piece_s,
            max_guesses=max_guesses,
            max_depth=max_depth,
        )
        for _ in range(100):
            for layer in LAYERS:
                self.prefetcher.computed(layer, LAYER_S)

    def guess(self, layer: int, expert: int = 4) -> list[str]:
        return [str(key) for key in self.prefetcher.guess(Seen(layer, HIDDEN[expert : expert + 1]))]

    def settle(self, layer: int, *experts: int) -> list[str]:
        used = [ExpertKey(layer, expert) for expert in experts]
        self.prefetcher.settle(layer, used)
        return [str(key) for key in self.prefetcher.take_disproved()]


def test_the_next_layers_are_guessed_nearest_first_by_score() -> None:
    node = Node()
    assert node.guess(1) == ["L03E004", "L03E003", "L05E004", "L05E003"]
    assert node.guess(1) == [], "they are under way"
    assert node.guess(7) == [], "nothing comes after the last"


def test_several_sequences_are_guessed_by_rank() -> None:
    """What both want is guessed once. Red when the first row alone is asked about."""
    node = Node(max_depth=1)
    keys = node.prefetcher.guess(Seen(1, HIDDEN[[4, 3, 7]]))
    assert [key.expert for key in keys] == [4, 3, 7, 2, 6]


def test_what_is_resident_is_not_guessed() -> None:
    node = Node()
    node.resident.add(ExpertKey(3, 4))
    assert node.guess(1) == ["L03E003", "L05E004", "L05E003"]


def test_wrong_guesses_are_withdrawn_when_the_router_has_spoken() -> None:
    node = Node()
    node.guess(1)
    assert node.settle(3, 4, 0) == ["L03E003"]
    assert node.settle(3, 4, 0) == [], "once"
    assert node.settle(5, 3, 4) == []
    first, second = node.prefetcher.distances
    assert (first.sent, first.right, second.sent, second.right) == (2, 1, 2, 2)
    assert first.precision == 0.5
    assert node.prefetcher.num_unguessed == 3, "expert 0 of layer 3 once, and both the second time"


def test_what_another_predictor_named_is_not_asked_for_again() -> None:
    """Nor withdrawn while it may be right; what it named wrongly is withdrawn, too."""
    node = Node()
    foresight = node.prefetcher.foresight
    for expert in (4, 6):
        foresight.guessed(ExpertKey(3, expert), "run_ahead", 2)
    assert node.guess(1) == ["L03E003", "L05E004", "L05E003"]
    assert node.settle(3, 4, 3) == ["L03E006"]
    assert node.prefetcher.num_unguessed == 0


def test_guesses_under_way_are_bounded() -> None:
    node = Node(max_guesses=3)
    assert node.guess(1) == ["L03E004", "L03E003", "L05E004"]
    assert node.guess(3) == []
    node.settle(3, 1, 2)
    assert node.guess(3) == ["L05E003", "L07E004"]


def test_a_rank_that_is_always_wrong_is_not_guessed_but_tried_now_and_then() -> None:
    """Red when all ranks share one precision: the good one pays for the bad one, or dies of it."""
    node = Node(piece_s=0.005, max_depth=1)
    sent = [""]
    for _ in range(200):
        sent = node.guess(1)
        node.settle(3, 4)
    assert node.prefetcher.depth == 1
    tried = [len(node.guess(1)) for _ in range(200) if node.settle(3, 4) is not None]
    assert tried.count(1) > 180 and 0 < tried.count(2) <= 13
    assert sent


@pytest.mark.parametrize(("piece_s", "depth"), [(0.001, 2), (0.1, 0)])
def test_guessing_ends_where_it_does_not_pay(piece_s: float, depth: int) -> None:
    """Wrong nine times of ten, it pays only where a demand hardly waits for a wrong one."""
    node = Node(piece_s=piece_s)
    for number in range(400):
        node.guess(1)
        right = number % 4 == 0
        node.settle(3, *((4, 3) if right else (0, 1)))
        node.settle(5, *((4, 3) if right else (0, 1)))
    assert node.prefetcher.depth == depth


def test_a_layer_that_never_misses_is_not_asked() -> None:
    node = Node()
    node.resident |= {ExpertKey(3, expert) for expert in range(NUM_EXPERTS)}
    for _ in range(300):
        node.settle(3, 1, 2)
    calls = []
    node.predictor.routers[3] = NextRouter(Watched(calls), None, None)  # type: ignore[arg-type]
    node.guess(1)
    assert calls == []


class Watched:
    """A weight that says when somebody multiplies with it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __torch_function__(self, func: object, *_: object) -> object:
        self.calls.append(str(func))
        raise AssertionError("asked")


def test_without_depth_nothing_is_guessed() -> None:
    assert Node(max_depth=0).guess(1) == []


def test_routers_choose_as_models_do() -> None:
    """With a bias; and with a correction after the sigmoid, as DeepSeek-V3 does."""
    pull = torch.zeros(NUM_EXPERTS)
    pull[6] = 5.0
    assert router().choose(HIDDEN[4:5], 2) == [[4, 3]]
    assert router(bias=pull).choose(HIDDEN[4:5], 2) == [[6, 4]]
    assert router(correction=pull).choose(HIDDEN[4:5], 2) == [[6, 4]]


def test_a_layer_whose_router_cannot_be_asked_is_passed_over() -> None:
    """A table of token ids chooses there; the layers after it are guessed as before."""
    node = Node()
    del node.predictor.routers[3]
    assert node.guess(1) == ["L05E004", "L05E003"]
