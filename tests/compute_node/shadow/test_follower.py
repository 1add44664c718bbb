"""A shadow's sequences: what it names is what its routers choose, however it came to its tokens.

Planted faults seen red: a wrong guess kept, a guess that was given up kept, states put at the wrong
tokens, the likeliest token guessed where a main node draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compute_node.boxes.shadow_link import State
from compute_node.cache.asked import never
from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.engine import Engine
from compute_node.engine.sampling import Sampler
from compute_node.moe.local import LocalBackend
from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.shadow.follower import Follower, OutOfStep, Token, nothing
from compute_node.shadow.naming import Named, NamingBackend
from proto import errors
from tests.contract.test_exactness import engine

TOKENS = [17, 300, 4, 92, 1000, 7, 55, 8]


class Heard(dict[int, dict[int, list[int]]]):
    """By position, then layer."""

    def tell(self, token: Token, layer: int, experts: list[int]) -> None:
        self.setdefault(token.position, {})[layer] = experts


@pytest.fixture
def follower(tiny_store: Path, run_dir: Path) -> Iterator[Follower]:
    with engine(tiny_store, run_dir) as node:
        yield follower_of(node)


def follower_of(node: Engine) -> Follower:
    named, loaded = Named(), node.loaded
    for layer, module in loaded.experts_modules.items():
        local = LocalBackend(layer, node.cache, loaded.prefetcher, loaded.timer)
        module.flashmoe._backend = NamingBackend(layer, local, named)
    return Follower(loaded, named)


def unchecked(guess: Token) -> None:
    """Nothing true has come."""


def test_it_names_what_each_layer_chose_for_the_latest_token(follower: Follower) -> None:
    heard = Heard()
    follower.follow("a", 0, TOKENS, heard.tell)
    spec = follower._loaded.spec
    assert list(heard) == [len(TOKENS) - 1]
    assert list(heard[len(TOKENS) - 1]) == list(spec.moe_layers)
    assert all(len(experts) == spec.top_k for experts in heard[len(TOKENS) - 1].values())
    alone = Heard()
    for number in range(len(TOKENS)):
        follower.follow("b", number, TOKENS[number : number + 1], alone.tell)
    common = [
        len(set(experts).intersection(alone[len(TOKENS) - 1][layer])) / spec.top_k
        for layer, experts in heard[len(TOKENS) - 1].items()
    ]
    assert sum(common) / len(common) > 0.9, "but for what rounding changes"


def test_tokens_may_come_one_by_one_and_a_wrong_guess_is_taken_back(follower: Follower) -> None:
    at_once, one_by_one = Heard(), Heard()
    for number in range(len(TOKENS)):  # decode has other bits than a prompt
        follower.follow("alone", number, TOKENS[number : number + 1], at_once.tell)
    for number in range(len(TOKENS)):
        follower.follow("guessing", number, TOKENS[number : number + 1], one_by_one.tell)
        follower.go_on("guessing", nothing, unchecked)
    assert one_by_one == at_once
    assert follower.num_guessed == len(TOKENS) and follower.num_guesses_right == 0


def test_a_right_guess_is_not_computed_again(follower: Follower) -> None:
    guessed, heard = Heard(), Heard()
    follower.follow("a", 0, TOKENS, nothing)
    follower.go_on("a", guessed.tell, unchecked)
    guess = follower._sequences["a"].token_ids[-1]
    follower.follow("a", len(TOKENS), [guess], heard.tell)
    assert list(guessed) == [len(TOKENS)] and not heard
    assert follower.num_guesses_right == 1


def test_it_guesses_what_the_main_node_will_draw(follower: Follower) -> None:
    """From the same logits; also after a guess that was wrong."""
    sampler = Sampler(SamplingOptions(temperature=1.5, seed=3), num_prompt=len(TOKENS))
    tokens, drawn = list(TOKENS), list[int]()
    for _ in range(6):
        follower.follow("a", len(drawn), tokens[len(drawn) :], nothing, (), sampler.drawing())
        logits = logits_of(follower, tokens)
        drawn = list(tokens)
        tokens.append(sampler.draw(tokens, logits))
        assert follower._sequences["a"].guess == tokens[-1]
        follower.go_on("a", nothing, unchecked)
    assert follower.num_guesses_right == 5
    likeliest = int(logits.argmax())
    tokens[-1] = likeliest + 1
    follower.follow("a", len(drawn), tokens[len(drawn) :], nothing, (), sampler.drawing())
    expected = sampler.draw(tokens, logits_of(follower, tokens))
    assert follower._sequences["a"].guess == expected


def logits_of(follower: Follower, token_ids: list[int]) -> torch.Tensor:
    """After these, computed one by one: [1, V]"""
    state = None
    for token_id in token_ids:
        part = Part("apart", Phase.DECODE, 1, 1)
        with torch.inference_mode(), Step(Batch(part), never).running():
            output = follower._loaded.forward(torch.tensor([[token_id]]), state)
        state = output.past_key_values
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def test_a_guess_that_is_given_up_leaves_nothing(follower: Follower) -> None:
    def check(guess: Token) -> None:
        raise errors.Cancelled("the main node has gone on")

    follower.follow("a", 0, TOKENS, nothing)
    with pytest.raises(errors.Cancelled):
        follower.go_on("a", nothing, check)
    expected, heard = Heard(), Heard()
    follower.follow("a", len(TOKENS), [3], heard.tell)
    follower.follow("b", 0, TOKENS, nothing)
    follower.follow("b", len(TOKENS), [3], expected.tell)
    assert heard == expected


def test_keys_and_values_of_the_main_node_take_the_place_of_its_own(follower: Follower) -> None:
    follower.follow("true", 0, TOKENS, nothing)
    layers = follower._sequences["true"].state.layers
    follower.follow("off", 0, [5] * len(TOKENS), nothing)
    states = [
        State(number, 2, layer.keys[0, :, 2:], layer.values[0, :, 2:]).to_pb()
        for number, layer in enumerate(layers)
    ]
    follower.follow("off", len(TOKENS), [3], nothing, states)
    mine = follower._sequences["off"].state.layers
    for true, own in zip(layers, mine, strict=True):
        assert torch.equal(true.keys[:, :, 2:], own.keys[:, :, 2 : len(TOKENS)])
        assert torch.equal(true.values[:, :, 2:], own.values[:, :, 2 : len(TOKENS)])
        assert not torch.equal(true.keys[:, :, :2], own.keys[:, :, :2])
    assert follower.num_states == len(TOKENS) - 2


def test_states_that_do_not_fit_are_refused(follower: Follower) -> None:
    follower.follow("a", 0, TOKENS, nothing)
    wide = torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    for state in (State(99, 0, wide, wide), State(0, 7, wide, wide), State(0, 0, wide, wide)):
        with pytest.raises(errors.InvalidRequest):
            follower.follow("a", len(TOKENS), [1], nothing, [state.to_pb()])


def test_tokens_that_are_not_there_are_asked_for(follower: Follower) -> None:
    with pytest.raises(OutOfStep) as raised:
        follower.follow("new", 5, [1], nothing)
    assert raised.value.num_tokens == 0
    follower.follow("a", 0, TOKENS, nothing)
    follower.forget("a")
    with pytest.raises(OutOfStep):
        follower.follow("a", len(TOKENS), [1], nothing)


def test_sequences_are_bounded(follower: Follower) -> None:
    for number in range(12):
        follower.follow(f"s{number}/", 0, TOKENS[:2], nothing)
    assert len(follower._sequences) == 8
    follower.forget("s1")
    assert sorted(follower._sequences) == [f"s{number}/" for number in range(4, 10)]
