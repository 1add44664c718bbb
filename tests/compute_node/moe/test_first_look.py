"""What a token's embedding says of the first layers is read before they are reached.

Planted faults seen red: a look where running ahead has looked already, a look that costs though
nothing misses, a broken session that ends the step, wrong guesses that are not withdrawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compute_node.moe.first_look import FirstLook
from compute_node.predict.predictor import EMBEDDING, Seen
from compute_node.predict.prefetcher import Prefetcher
from compute_node.predict.router_map import Part, RouterMap
from compute_node.store.session import SessionLost
from proto.expert import ExpertKey

NUM_EXPERTS, LAYERS = 8, (1, 3)


class ByEmbedding:
    """Names the experts of layer 1 by the token, and nothing else."""

    name = "map"

    def knows(self, seen: Seen, layer: int) -> bool:
        return seen.layer == EMBEDDING and layer == 1

    def scores(self, seen: Seen, layer: int) -> torch.Tensor:
        return seen.hidden


@dataclass
class Cache:
    """What `ExpertCache.read_ahead` was asked."""

    is_lost: bool = False
    room: int = 8
    asked: list[tuple[int, list[str], list[str], int]] = field(default_factory=list)

    def read_ahead(
        self, layer: int, keys: Sequence[ExpertKey], wrong: Sequence[ExpertKey], num_guesses: int
    ) -> Sequence[ExpertKey]:
        if self.is_lost:
            raise SessionLost("the store is gone")
        self.asked.append((layer, [*map(str, keys)], [*map(str, wrong)], num_guesses))
        return keys[: self.room]


def first_look(cache: Cache) -> FirstLook:
    prefetcher = Prefetcher(
        layers=LAYERS,
        predictors=[ByEmbedding()],
        truth=lambda layer, hidden: hidden,
        top_k=2,
        resident=set[ExpertKey](),
        read_s=lambda: 0.02,
        piece_s=lambda: 0.001,
        max_guesses=8,
        max_depth=2,
    )
    for _ in range(100):
        for layer in LAYERS:
            prefetcher.computed(layer, 0.1)
    return FirstLook(prefetcher, cache)  # type: ignore[arg-type]


def token(*experts: int) -> Seen:
    hidden = torch.zeros(1, NUM_EXPERTS)
    for place, expert in enumerate(experts):
        hidden[0, expert] = 5.0 - place
    return Seen(EMBEDDING, hidden)


def test_the_first_layers_experts_are_read_and_settled_as_other_guesses() -> None:
    cache = Cache()
    look = first_look(cache)
    assert look.pays
    look.look(token(4, 6))
    assert cache.asked == [(1, ["L01E004", "L01E006"], [], 2)]
    look.prefetcher.settle(1, [ExpertKey(1, 4), ExpertKey(1, 0)], token(4, 0).hidden)
    worth = look.prefetcher.foresight.worth("map", 1)
    assert (worth.right, worth.wrong) == (1, 1)


def test_what_is_disproved_meanwhile_is_withdrawn() -> None:
    """A step that was given up had guessed, too."""
    cache = Cache()
    look = first_look(cache)
    look.look(token(4, 6))
    look.look(token(4, 7))
    assert cache.asked[1] == (1, ["L01E007"], ["L01E006"], 2)


def test_what_there_is_no_room_to_read_was_not_foreseen() -> None:
    """Red: an expert that nobody asked the store for counts as sent, and as a miss foreseen."""
    look = first_look(Cache(room=1))
    look.look(token(4, 6))
    foresight, distance = look.prefetcher.foresight, look.prefetcher.distances[0]
    assert [*map(str, foresight.about(1))] == ["L01E004"] and distance.sent == 1
    look.prefetcher.settle(1, [ExpertKey(1, 4), ExpertKey(1, 6)], token(4, 6).hidden)
    assert (foresight.misses.num_foreseen, look.prefetcher.num_unguessed) == (1, 1)
    assert (foresight.worth("map", 1).right, distance.right) == (1, 1)


def test_where_running_ahead_has_looked_it_does_not() -> None:
    look = first_look(Cache())
    look.prefetcher.foresight.guessed(ExpertKey(1, 5), "run_ahead", 2)
    assert not look.pays


def test_where_nothing_misses_it_does_not() -> None:
    look = first_look(Cache())
    for _ in range(300):
        for layer in LAYERS:
            look.prefetcher.settle(layer, [], token(0).hidden)
    assert not look.pays


def test_a_broken_session_is_left_to_the_step() -> None:
    look = first_look(Cache(is_lost=True))
    look.look(token(4, 6))
    assert not len(look.prefetcher.foresight) and not look.prefetcher.distances[0].sent


def test_there_is_none_where_nothing_is_known_of_embeddings() -> None:
    look = first_look(Cache())
    empty = torch.zeros(0).numpy()
    for parts, expected in (({}, False), ({EMBEDDING: Part((1,), empty, empty, empty)}, True)):
        learned = RouterMap("a store", NUM_EXPERTS, 4, 1, parts)
        found = FirstLook.of(look.prefetcher, look.cache, learned)
        assert (found is not None) == expected
    assert FirstLook.of(look.prefetcher, look.cache, None) is None
