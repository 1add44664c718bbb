"""Who is resident under a budget, array-wise: the mechanism that every ranking policy shares.

One (step, layer) is one event: its experts are pinned while room is made for those that miss.
"""

from __future__ import annotations

from typing import Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from proto import errors
from scheduler.policy.ranking import Ranks

Hits = NDArray[np.bool_]


class SlotsTooFew(errors.MemoryExceeded):
    """The experts of one token do not fit."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class Slots(Protocol):
    """A set of residents."""

    def step(self, topk_ids: NDArray[np.uint16], before: Ranks, after: Ranks) -> Hits:
        """One decode step, layer after layer. Returns [L, K], which were resident when asked for.

        topk_ids: [L, K]
        before:   [L, E], ranks that hold for layers whose event of this step is still to come
        after:    [L, E], ranks that hold once a layer's event is known
        """
        ...


def make_slots(shape: tuple[int, int], top_k: int, slots: int, *, pooled: bool) -> Slots:
    """slots: a layer; a pool has as many in all. Raises SlotsTooFew naming what works."""
    if slots < top_k:
        raise SlotsTooFew(
            f"{slots} slots a layer cannot hold the {top_k} experts a token uses: "
            f"give at least {top_k}"
        )
    return PoolSlots(shape, slots * shape[0]) if pooled else LayerSlots(shape, slots)


class LayerSlots:
    """So many slots for each layer."""

    def __init__(self, shape: tuple[int, int], slots: int) -> None:
        self._slots = slots
        self._resident = np.zeros(shape, np.bool_)
        self._rows = np.arange(shape[0])[:, None]

    def step(self, topk_ids: NDArray[np.uint16], before: Ranks, after: Ranks) -> Hits:
        at = (self._rows, topk_ids.astype(np.intp))
        hits: Hits = self._resident[at]
        if hits.all():
            return hits
        self._resident[at] = True
        excess = np.count_nonzero(self._resident, axis=1) - self._slots
        full = np.flatnonzero(excess > 0)
        if len(full):
            self._evict(full, excess[full], at[1][full], after)
        return hits

    def _evict(
        self,
        full: NDArray[np.intp],
        excess: NDArray[np.intp],
        pinned: NDArray[np.intp],
        ranks: Ranks,
    ) -> None:
        order = np.where(self._resident[full], ranks[full], np.inf)
        order[np.arange(len(full))[:, None], pinned] = np.inf
        first = order.argsort(axis=1, kind="stable")
        row, place = np.nonzero(np.arange(first.shape[1]) < excess[:, None])
        self._resident[full[row], first[row, place]] = False


class PoolSlots:
    """One pool for the experts of all layers."""

    def __init__(self, shape: tuple[int, int], capacity: int) -> None:
        self._free = capacity
        self._resident = np.zeros(shape, np.bool_)
        self._rows = np.arange(shape[0])[:, None]

    def step(self, topk_ids: NDArray[np.uint16], before: Ranks, after: Ranks) -> Hits:
        ids = topk_ids.astype(np.intp)
        hits: Hits = self._resident[self._rows, ids]
        gone: set[tuple[int, int]] = set()  # evicted in this step, so perhaps before their turn
        order = np.where(self._resident, before, np.inf)
        known = 0  # layers whose ranks in `order` are those after their event
        for layer in range(len(ids)):
            if gone:
                hits[layer] = self._resident[layer, ids[layer]]
            misses = int((~hits[layer]).sum())
            if not misses:
                continue
            self._resident[layer, ids[layer]] = True
            self._free -= misses
            if self._free < 0:
                heard = slice(known, layer + 1)
                order[heard] = np.where(self._resident[heard], after[heard], np.inf)
                known = layer + 1
                self._evict(order, layer, ids[layer], gone)
        return hits

    def _evict(
        self, order: Ranks, layer: int, pinned: NDArray[np.intp], gone: set[tuple[int, int]]
    ) -> None:
        held = order[layer, pinned]
        order[layer, pinned] = np.inf
        while self._free < 0:
            at = divmod(int(order.argmin()), order.shape[1])
            self._resident[at] = False
            order[at] = np.inf
            gone.add(at)
            self._free += 1
        order[layer, pinned] = held
