"""Belady's optimum as the stream comes: how many hits the best of all policies would have had up to
now, exactly, at each step, without a look ahead and without a replay.

An expert kept from one use to the next fills a slot at every event between the two, where the
event's own experts leave that many slots free. The most such intervals fit when each one, as it
ends, gets the slot that was given up last before it began (interval scheduling on identical
machines).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.simulate.slots import Hits

NEVER = -1


class Optimum:
    """MIN of the events so far. One pool when `capacities` has one entry, else one a layer.

    capacities: slots
    """

    def __init__(self, shape: tuple[int, int], top_k: int, capacities: Sequence[int]) -> None:
        num_layers, num_experts = shape
        # When each slot that no event needs for its own was last given up, ascending.
        free = [[0] * (slots - top_k) for slots in capacities]
        self._free = free * num_layers if len(free) == 1 else free
        self._last_used = [[NEVER] * num_experts for _ in range(num_layers)]  # event
        self._events_a_step = num_layers if len(capacities) == 1 else 1
        self._num_steps = 0

    def step(self, topk_ids: NDArray[np.uint16]) -> Hits:
        """One decode step, [L, K]. Returns [L, K], which uses were hits: as many up to now as MIN
        can have.
        """
        now = self._num_steps * self._events_a_step
        between = self._events_a_step > 1  # events of other layers come between those of one
        hits = []
        for layer, experts in enumerate(topk_ids.tolist()):
            hits += self._event(layer, experts, now + layer * between)
        self._num_steps += 1
        return np.array(hits, np.bool_).reshape(topk_ids.shape)

    def _event(self, layer: int, experts: list[int], now: int) -> list[bool]:
        last_used, free = self._last_used[layer], self._free[layer]
        hits = []
        for expert in experts:
            since = last_used[expert]
            last_used[expert] = now
            if since == now - 1 and since != NEVER:
                hits.append(True)  # no event between, no slot to hold
                continue
            at = bisect_right(free, since) - 1
            if at >= 0:
                del free[at]
                free.append(now - 1)
            hits.append(at >= 0)
        return hits
