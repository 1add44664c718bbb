"""A sequence's state apart from it: what grows with its tokens by the part, the rest as it was at
the end of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from compute_node.run_ahead.fork import copied
from proto.checkpoint.sequence_state import state_bytes

Grown = tuple[Tensor, Tensor]
"""Keys and values of some tokens, in one layer."""


@dataclass(frozen=True)
class SavedPart:
    """What a part of a prompt adds to a sequence's state.

    grown: by layer that grows by the token and is never rewritten; None: of other layers
    rest:  transformers' cache without these layers' tensors, at the end of the part: recurrent and
           convolution states, sliding windows
    """

    grown: tuple[Grown | None, ...]
    rest: Any

    @classmethod
    def of(cls, cache: Any, num_tokens: int) -> SavedPart:
        """A copy of what the sequence's latest `num_tokens` made of it."""
        grown = tuple(
            _latest(layer, num_tokens) if _grows(layer) else None for layer in cache.layers
        )
        return cls(grown, _without_grown(cache))

    @cached_property
    def rest_bytes(self) -> int:
        return state_bytes(self.rest)

    @cached_property
    def num_bytes(self) -> int:
        return self.rest_bytes + sum(
            tensor.nbytes for grown in self.grown if grown is not None for tensor in grown
        )

    def without_rest(self) -> SavedPart:
        """For a part that another one follows."""
        return SavedPart(self.grown, None)


def restored(parts: Sequence[SavedPart]) -> Any:
    """A copy of a sequence's state after these parts, its first. The last of them has its rest."""
    cache = copied(parts[-1].rest, Tensor.clone)
    for number, layer in enumerate(cache.layers):
        pieces = [piece for part in parts if (piece := part.grown[number]) is not None]
        if pieces:
            layer.keys = torch.cat([keys for keys, _ in pieces], dim=-2)
            layer.values = torch.cat([values for _, values in pieces], dim=-2)
    return cache


def _grows(layer: Any) -> bool:
    """By its tokens alone, and what is there stays. A layer that no token has reached, as where
    layers share keys and values, has nothing to save.
    """
    return type(layer) is DynamicLayer and layer.is_initialized


def _latest(layer: Any, num_tokens: int) -> Grown:
    return layer.keys[..., -num_tokens:, :].clone(), layer.values[..., -num_tokens:, :].clone()


def _without_grown(cache: Any) -> Any:
    shell = object.__new__(type(cache))
    shell.__dict__.update(cache.__dict__)
    shell.layers = [_emptied(layer) if _grows(layer) else layer for layer in cache.layers]
    return copied(shell, Tensor.clone)


def _emptied(layer: Any) -> Any:
    empty = object.__new__(type(layer))
    empty.__dict__.update(layer.__dict__, keys=None, values=None)
    return empty
