"""Guesses: which, when they pay, when they are withdrawn.

Planted faults seen red: residents guessed, right guesses withdrawn, no bound, one precision for all
grades, guessing though it does not pay, never asking again, asking layers that never miss, no
correction after the sigmoid, guessed misses counted as unguessed, a hash router's weight asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from compute_node.predict.next_router import NextRouter, NextRouters
from compute_node.predict.predictor import Guess, Seen, graded
from compute_node.predict.prefetcher import Prefetcher
from proto.expert import ExpertKey

LAYERS = (1, 3, 5, 7)
NUM_EXPERTS, TOP_K, READ_S, LAYER_S = 8, 2, 0.02, 0.1
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
            predictors=[self.predictor],
            truth=self.predictor.truth,
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
        self.prefetcher.settle(layer, used, HIDDEN[4:5])
        return [str(key) for key in self.prefetcher.take_disproved()]


def test_the_next_layers_are_guessed_nearest_first_by_score() -> None:
    node = Node()
    assert node.guess(1) == ["L03E004", "L03E003", "L05E004", "L05E003"]
    assert node.guess(1) == [], "they are under way"
    assert node.guess(7) == [], "nothing comes after the last"


def test_several_sequences_are_guessed_by_grade() -> None:
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


def test_a_later_look_withdraws_what_it_does_not_name() -> None:
    """Red when it stays, when what another predictor named goes too, and when it counts as open."""
    node = Node()
    assert node.guess(1) == ["L03E004", "L03E003", "L05E004", "L05E003"]
    node.prefetcher.foresight.guessed(ExpertKey(3, 3), "run_ahead", 1)
    assert node.guess(1, expert=7) == ["L03E007", "L03E006", "L05E007", "L05E006"]
    assert [str(key) for key in node.prefetcher.take_disproved()] == [
        "L03E004",
        "L05E003",
        "L05E004",
    ]
    assert node.settle(3, 6, 3) == ["L03E007"]
    worth = node.prefetcher.foresight.worth("next_router", 1)
    assert (worth.right, worth.wrong) == (1, 3)


def test_an_early_look_is_for_the_next_layer_only() -> None:
    """Red when it looks as far as the one that follows it."""
    node = Node()
    early = Seen(1, HIDDEN[4:5], stream=HIDDEN[4:5])
    assert {key.layer for key in node.prefetcher.guess(early)} == {3}
    late = replace(early, output=HIDDEN[4:5])
    assert {key.layer for key in node.prefetcher.guess(late)} == {5}


def test_the_first_predictor_that_knows_a_layer_is_asked() -> None:
    node = Node(max_depth=1)
    surer = Named("map", {3: 1})
    node.prefetcher.predictors = [surer, node.predictor]
    assert node.guess(1)[0] == "L03E001"
    assert node.guess(3) == ["L05E004", "L05E003"]
    node.settle(3, 1)
    assert node.prefetcher.foresight.worth("map", 1).right == 1


@dataclass
class Named:
    """Names the one expert of a layer that a test says."""

    name: str
    guesses: dict[int, int]

    def knows(self, seen: Seen, layer: int) -> bool:
        return layer in self.guesses

    def scores(self, seen: Seen, layer: int) -> torch.Tensor:
        return 10 * HIDDEN[self.guesses[layer]][None] - torch.arange(NUM_EXPERTS)


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


def test_a_grade_that_is_always_wrong_is_no_longer_read_but_still_measured() -> None:
    """Red when all grades share one precision: the good one pays for the bad one, or dies of it;
    red when what is not sent is not measured.
    """
    node = Node(max_depth=1)
    for _ in range(200):
        node.guess(1)
        node.settle(3, 4)
    assert node.prefetcher.depth == 1
    assert node.guess(1) == ["L03E004"]
    node.settle(3, 4)
    for _ in range(60):
        node.guess(1)
        node.settle(3, 4, 3)
    assert node.guess(1) == ["L03E004", "L03E003"]


def test_a_device_that_is_always_busy_wants_surer_guesses() -> None:
    """A wrong read then delays others by all of it, not by a piece."""
    for layer_s, expected in ((0.1, ["L03E004", "L03E003"]), (0.001, [])):
        node = Node(max_depth=1)
        for _ in range(200):
            for layer in LAYERS:
                node.prefetcher.computed(layer, layer_s)
        assert node.guess(1) == expected


@pytest.mark.parametrize(("piece_s", "depth"), [(0.001, 2), (0.1, 0)])
def test_guessing_ends_where_it_does_not_pay(piece_s: float, depth: int) -> None:
    """Wrong every other time, it pays only where a demand hardly waits for a wrong one."""
    node = Node(piece_s=piece_s)
    for number in range(400):
        node.guess(1)
        right = number % 2 == 0
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
    for asked, expected in (
        (router(), [4, 3]),
        (router(bias=pull), [6, 4]),
        (router(correction=pull), [6, 4]),
    ):
        assert asked.foresee(Seen(1, HIDDEN[4:5])).topk(2).indices.tolist() == [expected]


def test_the_residual_stream_and_what_was_added_to_it_are_asked_about_where_both_are_known() -> (
    None
):
    """Red when the norm is left out, and when the layer's input is asked about all the same."""
    asked = replace(router(), norm=lambda stream: stream.roll(1, 1))
    seen = Seen(1, HIDDEN[4:5], stream=HIDDEN[2:3])
    assert asked.foresee(seen).argmax() == 4
    assert asked.foresee(replace(seen, output=3 * HIDDEN[5:6])).argmax() == 6


def test_grades_are_by_the_distance_from_the_boundary() -> None:
    """What is as good as chosen is named, too; what is far from it is not."""
    scores = torch.tensor([[10.0, 5.2, 5.0, 4.9, 4.5, 0.0, 0.0, 0.0]])
    assert graded(scores, 2) == [Guess(0, 0), Guess(8, 1), Guess(9, 2), Guess(9, 3), Guess(11, 4)]
    assert graded(scores[:, :2], 2) == [Guess(0, 0), Guess(8, 1)]
    both = torch.cat([scores, scores.flip(1)])
    assert [guess.expert for guess in graded(both, 2)] == [0, 7, 1, 6, 2, 3, 4, 5]


def test_a_layer_whose_router_cannot_be_asked_is_passed_over() -> None:
    """A table of token ids chooses there; the layers after it are guessed as before."""
    node = Node()
    del node.predictor.routers[3]
    assert node.guess(1) == ["L05E004", "L05E003"]


def test_what_a_router_is_always_wrong_by_is_corrected() -> None:
    """The layer's own router favours expert 6 by what it gets there, not by what came before. Red
    when the prefetcher does not hand on what the layer's experts get.
    """
    node = Node(max_depth=1)
    reached = torch.zeros(1, NUM_EXPERTS)
    reached[0, 6] = 3.0
    for _ in range(30):
        node.guess(1)
        node.prefetcher.settle(3, [ExpertKey(3, 6), ExpertKey(3, 5)], reached)
    assert node.guess(1)[:2] == ["L03E006", "L03E005"]
