"""Predicts with the next layers' routers and what was learned about them, see `RouterMap`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.predict.next_router import NextRouters
from compute_node.predict.predictor import EMBEDDING, Seen
from compute_node.predict.router_map import Part, RouterMap

_EPSILON = 1e-12


class MappedRouters:
    """A `Predictor`. One thread. What is seen before the first layer is a token's embedding, which
    no router can be asked about: there the map answers alone.
    """

    name = "map"

    def __init__(self, router_map: RouterMap, next_routers: NextRouters) -> None:
        self._routers = next_routers.routers
        self._parts = {
            layer: _Weights.of(part, router_map.num_experts)
            for layer, part in router_map.parts.items()
        }
        self._latest: tuple[Seen, Tensor] | None = None  # one product serves all layers ahead

    def knows(self, seen: Seen, layer: int) -> bool:
        part = self._parts.get(seen.layer)
        if part is None or layer not in part.places or layer not in self._routers:
            return False
        return model_input(seen) is not None

    def scores(self, seen: Seen, layer: int) -> Tensor:
        part = self._parts[seen.layer]
        if self._latest is None or self._latest[0] is not seen:
            self._latest = seen, part.corrections(seen)
        correction = self._latest[1][:, part.places[layer]]
        if seen.layer == EMBEDDING:
            return correction
        return self._routers[layer].foresee(seen).float() + correction


def model_input(seen: Seen) -> Tensor | None:
    """What a map reads, over its root mean square, [T, D]; None: not recognised, or too early."""
    if seen.layer == EMBEDDING:
        hidden = seen.hidden.float()
    elif seen.stream is None or seen.output is None:
        return None
    else:
        hidden = (seen.stream + seen.output).float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + _EPSILON)


@dataclass(frozen=True)
class _Weights:
    """A `Part` in float32. places: its columns of each layer that it foretells"""

    places: dict[int, slice]
    down: Tensor
    up: Tensor
    bias: Tensor

    @classmethod
    def of(cls, part: Part, num_experts: int) -> _Weights:
        places = {
            layer: slice(number * num_experts, (number + 1) * num_experts)
            for number, layer in enumerate(part.layers)
        }
        down, up, bias = (torch.from_numpy(tensor).float() for tensor in part.tensors().values())
        return cls(places, down, up, bias)

    def corrections(self, seen: Seen) -> Tensor:
        """[T, N * E]"""
        read = model_input(seen)
        assert read is not None, "asked about what it does not know"
        return functional.linear(functional.linear(read, self.down), self.up, self.bias)
