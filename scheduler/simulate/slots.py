"""Who is resident under a budget, array-wise: the mechanism that every ranking policy shares.

One (step, layer) is one event: its experts are pinned while room is made for those that miss.
"""

from __future__ import annotations

import heapq
import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from proto import errors
from scheduler.simulate.ranking import Ranks

Hits = NDArray[np.bool_]
Entry = tuple[float, int]  # rank, place in the flat pool

NOBODY: Entry = (math.inf, -1)
CANDIDATES_PER_MISS = 4  # looked at first when a pool makes room ...
SPARE_CANDIDATES = 32  # ... and this many more


class SlotsTooFew(errors.InvalidRequest):
    """The experts of one token do not fit."""


class Slots(Protocol):
    """A set of residents."""

    @property
    def resident(self) -> NDArray[np.bool_]:
        """[L, E], now; a view."""
        ...

    def step(self, topk_ids: NDArray[np.uint16], before: Ranks, after: Ranks) -> Hits:
        """One decode step, layer after layer. Returns [L, K], which were resident when asked for.

        topk_ids: [L, K]
        before:   [L, E], ranks that hold for layers whose event of this step is still to come
        after:    [L, E], ranks that hold once a layer's event is known
        """
        ...


def check_slots(top_k: int, slots: int) -> None:
    """slots: a layer. Raises SlotsTooFew naming what works."""
    if slots < top_k:
        raise SlotsTooFew(
            f"{slots} slots a layer cannot hold the {top_k} experts a token uses: "
            f"give at least {top_k}"
        )


def make_slots(shape: tuple[int, int], top_k: int, slots: int, *, pooled: bool) -> Slots:
    """slots: a layer; a pool has as many in all. Raises SlotsTooFew naming what works."""
    check_slots(top_k, slots)
    return PoolSlots(shape, slots * shape[0]) if pooled else LayerSlots(shape, slots)


class LayerSlots:
    """Slots divided by layer. slots: of each layer; [L] where layers have different shares."""

    def __init__(self, shape: tuple[int, int], slots: int | NDArray[np.intp]) -> None:
        self._slots = slots
        self._resident = np.zeros(shape, np.bool_)
        self._rows = np.arange(shape[0])[:, None]

    @property
    def resident(self) -> NDArray[np.bool_]:
        return self._resident

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
        by_excess = (-excess).argsort()  # so that layers with room enough drop off at the end
        layers, excess = full[by_excess], excess[by_excess]
        order = np.where(self._resident[layers], ranks[layers], np.inf)
        rows = np.arange(len(layers))
        order[rows[:, None], pinned[by_excess]] = np.inf
        for evicted in range(excess[0]):
            rows = rows[: np.count_nonzero(excess > evicted)]
            first = order[: len(rows)].argmin(axis=1)
            order[rows, first] = np.inf
            self._resident[layers[: len(rows)], first] = False


class PoolSlots:
    """One pool for the experts of all layers. An expert's place is its index in the flat pool."""

    def __init__(self, shape: tuple[int, int], capacity: int) -> None:
        self._free = capacity
        self._num_experts = shape[1]
        self._resident = np.zeros(shape, np.bool_)
        self._first = (np.arange(shape[0]) * shape[1])[:, None]

    @property
    def resident(self) -> NDArray[np.bool_]:
        return self._resident

    def step(self, topk_ids: NDArray[np.uint16], before: Ranks, after: Ranks) -> Hits:
        places = self._first + topk_ids  # [L, K]
        resident = self._resident.ravel()  # a view
        hits: Hits = resident[places]
        num_misses = int(np.count_nonzero(~hits))
        if num_misses <= self._free:
            resident[places] = True
            self._free -= num_misses
            return hits
        held_before = np.flatnonzero(resident)
        resident[places] = True
        held_after = np.flatnonzero(resident)
        limit = CANDIDATES_PER_MISS * num_misses + SPARE_CANDIDATES
        gone = None
        while gone is None:
            waiting, waiting_to = _lowest(held_before, before, limit)
            heard, heard_to = _lowest(held_after, after, limit)
            gone = self._evict(
                places.tolist(),
                hits,
                _Waiting(waiting, self._num_experts),
                _Heard(heard, self._num_experts, len(places)),
                min(waiting_to, heard_to),
            )
            limit = len(held_after)
        resident[gone] = False
        return hits

    def _evict(
        self,
        places: list[list[int]],
        hits: Hits,
        waiting: _Waiting,
        heard: _Heard,
        known_to: float,
    ) -> list[int] | None:
        """Make room layer after layer. An expert that is evicted before its own layer's turn is a
        miss then, in `hits` too. Returns the places that are empty at the end; None, with nothing
        changed, when an expert would go that ranks above `known_to`, where not all candidates are
        known.
        """
        gone: set[int] = set()
        free, found = self._free, hits.copy()
        misses = np.count_nonzero(~hits, axis=1).tolist()
        for layer, pinned in enumerate(places):
            for back in gone.intersection(pinned):
                found[layer, pinned.index(back)] = False
                misses[layer] += 1
                gone.remove(back)
            waiting.turn(layer)
            heard.turn(layer, gone, pinned)
            free -= misses[layer]
            while free < 0:
                one, other = waiting.first(), heard.first()
                if min(one, other)[0] > known_to:
                    return None
                gone.add(waiting.pop() if one < other else heard.pop())
                free += 1
        self._free = free
        hits[:] = found
        return list(gone)


def _lowest(held: NDArray[np.intp], ranks: Ranks, limit: int) -> tuple[list[Entry], float]:
    """The lowest `limit` of these places or more, the last goes first; and up to which rank they
    are all there.
    """
    values = ranks.ravel()[held]
    known_to = math.inf
    if limit < len(held):
        known_to = float(np.partition(values, limit)[limit])
        low = np.flatnonzero(values <= known_to)
        held, values = held[low], values[low]
    order = values.argsort(kind="stable")[::-1]
    return list(zip(values[order].tolist(), held[order].tolist(), strict=True)), known_to


class _Waiting:
    """Residents of layers whose event of this step is still to come."""

    def __init__(self, by_rank: list[Entry], num_experts: int) -> None:
        self._queue = by_rank
        self._num_experts = num_experts
        self._turn = 0  # places below it have had their event

    def turn(self, layer: int) -> None:
        self._turn = (layer + 1) * self._num_experts

    def first(self) -> Entry:
        while self._queue and self._queue[-1][1] < self._turn:
            self._queue.pop()
        return self._queue[-1] if self._queue else NOBODY

    def pop(self) -> int:
        """After `first`."""
        return self._queue.pop()[1]


class _Heard:
    """Residents of layers whose event has come, but for those of the current layer."""

    def __init__(self, by_rank: list[Entry], num_experts: int, num_layers: int) -> None:
        self._num_experts = num_experts
        self._queues: list[list[Entry]] = [[] for _ in range(num_layers)]
        for entry in by_rank:
            self._queues[entry[1] // num_experts].append(entry)
        self._heads: list[Entry] = []  # a heap with the first of every queue that was heard
        self._pinned: list[int] = []
        self._aside: list[Entry] = []  # pinned ones that were met

    def turn(self, layer: int, gone: set[int], pinned: list[int]) -> None:
        """gone: those that went while they waited."""
        for entry in self._aside:
            heapq.heappush(self._heads, entry)
        self._aside.clear()
        self._pinned = pinned
        if gone:
            self._queues[layer] = [entry for entry in self._queues[layer] if entry[1] not in gone]
        self._advance(layer)

    def first(self) -> Entry:
        while self._heads and self._heads[0][1] in self._pinned:
            self._aside.append(self._heads[0])
            self.pop()
        return self._heads[0] if self._heads else NOBODY

    def pop(self) -> int:
        """After `first`."""
        _, place = heapq.heappop(self._heads)
        self._advance(place // self._num_experts)
        return place

    def _advance(self, layer: int) -> None:
        if self._queues[layer]:
            heapq.heappush(self._heads, self._queues[layer].pop())
