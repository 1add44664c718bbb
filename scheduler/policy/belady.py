"""Belady's optimum: evicts what is used again farthest in the future, which it knows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess
from scheduler.simulate.ranking import Ranks, chosen


class Belady:
    """The fewest misses that any policy can have on these events (Belady 1966).

    topk_ids: [T, L, K], the events that `observe` will be given, in this order
    """

    def __init__(self, topk_ids: NDArray[np.uint16], num_experts: int) -> None:
        num_layers = topk_ids.shape[1]
        self._layers = np.arange(num_layers, dtype=np.float64)[:, None]
        self._next_steps, first = _next_steps(topk_ids, num_experts)
        self._next_event = first * num_layers + self._layers
        self._num_steps = 0

    def observe(self, event: DecodeAccess) -> None:
        step = self._next_steps[self._num_steps]  # [L, K]
        self._next_event[chosen(event)] = step * len(self._layers) + self._layers
        self._num_steps += 1

    def ranks(self) -> Ranks:
        ranks: Ranks = -self._next_event
        return ranks


def _next_steps(topk_ids: NDArray[np.uint16], num_experts: int) -> tuple[Ranks, Ranks]:
    """When each use [T, L, K] is followed by the next, and when each expert [L, E] is first used;
    inf for never.
    """
    num_steps, num_layers, _ = topk_ids.shape
    following = np.full((num_layers, num_experts), np.inf)
    after = np.empty(topk_ids.shape)
    rows = np.arange(num_layers)[:, None]
    for step in range(num_steps - 1, -1, -1):
        ids = topk_ids[step].astype(np.intp)
        after[step] = following[rows, ids]
        following[rows, ids] = step
    return after, following
