"""The experts a node holds, each layer in the order in which a policy would give them up."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

from compute_node.cache.policies.policy import EvictionPolicy
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey

Entry = tuple[float, ExpertKey]


class Residents:
    """Sorts a layer only when something changed in it: a pool of thousands is not looked through
    at every miss.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self._held: dict[int, dict[int, Borrowed]] = {layer: {} for layer in layers}
        self._orders: dict[int, list[Entry]] = {}
        self._ordered_by: EvictionPolicy | None = None
        self._num_held = 0

    def __len__(self) -> int:
        return self._num_held

    def __contains__(self, key: ExpertKey) -> bool:
        return key.expert in self._held[key.layer]

    def __getitem__(self, key: ExpertKey) -> Borrowed:
        return self._held[key.layer][key.expert]

    def count(self, layer: int) -> int:
        return len(self._held[layer])

    def insert(self, borrowed: Borrowed) -> None:
        layer = self._held[borrowed.key.layer]
        self._num_held += borrowed.key.expert not in layer
        layer[borrowed.key.expert] = borrowed
        self._orders.pop(borrowed.key.layer, None)

    def evict(self, key: ExpertKey) -> None:
        del self._held[key.layer][key.expert]
        self._num_held -= 1
        self._orders.pop(key.layer, None)

    def clear(self) -> None:
        for layer in self._held.values():
            layer.clear()
        self._orders.clear()
        self._num_held = 0

    def on_step(self, layer: int) -> None:
        """Policies rank the experts of this layer anew."""
        self._orders.pop(layer, None)

    def victims(
        self,
        policy: EvictionPolicy,
        count: int,
        pinned: Collection[ExpertKey] = (),
        layer: int | None = None,
    ) -> list[ExpertKey]:
        """The `count` to give up next, of one layer or of all; ties go by key, lowest first.
        Choosing changes nothing.
        """
        if policy is not self._ordered_by:
            self._orders.clear()
            self._ordered_by = policy
        layers = self._held if layer is None else (layer,)
        going = heapq.merge(*(self._order(policy, one) for one in layers))
        evictable = (key for _, key in going if key not in pinned)
        return [key for _, key in zip(range(count), evictable, strict=False)]

    def _order(self, policy: EvictionPolicy, layer: int) -> list[Entry]:
        order = self._orders.get(layer)
        if order is None:
            order = sorted((policy.rank(held.key), held.key) for held in self._held[layer].values())
            self._orders[layer] = order
        return order
