"""What a second pass asks its guide, and what it makes of the experts that it may use.

Planted faults seen red: transformers' mark for no expert foreseen, weights not made to sum to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compute_node.moe.route import Route
from compute_node.run_ahead.fork import Fork, Geometry
from compute_node.run_ahead.layers import DecoderLayers
from compute_node.run_ahead.second_pass import SecondPass, Start

NUM_EXPERTS = 8


class Guide:
    """Never in a hurry. held: experts that are resident."""

    def __init__(self, *held: int) -> None:
        self.held, self.foreseen = held, list[list[int]]()

    def is_due(self) -> bool:
        return False

    def foresee(self, num_tokens: int, layer: int, experts: Sequence[int]) -> bool:
        self.foreseen.append(list(experts))
        return False

    def usable(self, layer: int, experts: Sequence[int]) -> Mapping[int, Any]:
        return {
            expert: {"number": torch.tensor(expert)} for expert in experts if expert in self.held
        }


class Kernels:
    """An expert's output is its number."""

    def one_token(self, experts: Sequence[Any], hidden: Tensor, gates: Sequence[float]) -> Tensor:
        return torch.full_like(hidden, float(experts[0]["number"])) * gates[0]


def second(guide: Guide) -> SecondPass:
    state = DynamicCache()
    start = Start(torch.tensor([[1]]), stalled=0, so_far=torch.ones(1, 4), draw=None)
    layers = DecoderLayers()
    return SecondPass(lambda ids, of: None, layers, Fork(state, Geometry(state)), start, guide)


def output(guide: Guide, layer: int, ids: list[int], weights: list[float]) -> list[float]:
    route = Route(torch.tensor([ids]), torch.tensor([weights]))
    kernels: Any = Kernels()
    made = second(guide).experts(layer, kernels, NUM_EXPERTS, torch.zeros(1, 4), route)
    return [float(number) for number in made[0]]


def test_the_heaviest_first_and_no_mark_for_none() -> None:
    guide = Guide()
    assert output(guide, 1, [3, NUM_EXPERTS, 5], [0.25, 0.5, 0.75]) == [0.0] * 4
    assert guide.foreseen == [[5, 3]]


def test_weights_of_what_is_there_stand_for_all() -> None:
    assert output(Guide(2), 1, [2, 3], [0.25, 0.75]) == [2.0] * 4


def test_the_stalled_layer_gives_what_is_known_of_it() -> None:
    guide = Guide(2)
    assert output(guide, 0, [2, 3], [0.5, 0.5]) == [1.0] * 4
    assert guide.foreseen == []
