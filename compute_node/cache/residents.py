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
        self._bytes = dict.fromkeys(self._held, 0)
        self._num_held = 0

    def __len__(self) -> int:
        return self._num_held

    def __contains__(self, key: ExpertKey) -> bool:
        return key.expert in self._held[key.layer]

    def __getitem__(self, key: ExpertKey) -> Borrowed:
        return self._held[key.layer][key.expert]

    def held_bytes(self, layer: int | None = None) -> int:
        """Of one layer, or of all."""
        return sum(self._bytes.values()) if layer is None else self._bytes[layer]

    def insert(self, borrowed: Borrowed) -> None:
        key = borrowed.key
        assert key not in self, "the store lends an expert once a session"
        self._held[key.layer][key.expert] = borrowed
        self._num_held += 1
        self._bytes[key.layer] += borrowed.size_bytes
        self._orders.pop(key.layer, None)

    def evict(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            self._bytes[key.layer] -= self._held[key.layer].pop(key.expert).size_bytes
            self._num_held -= 1
            self._orders.pop(key.layer, None)

    def clear(self) -> None:
        for layer in self._held.values():
            layer.clear()
        self._orders.clear()
        self._bytes = dict.fromkeys(self._held, 0)
        self._num_held = 0

    def on_step(self, layer: int) -> None:
        """Policies rank the experts of this layer anew."""
        self._orders.pop(layer, None)

    def victims(
        self,
        policy: EvictionPolicy,
        excess_bytes: int,
        pinned: Collection[ExpertKey] = (),
        layer: int | None = None,
    ) -> list[ExpertKey]:
        """Those to give up next, of one layer or of all, until they are `excess_bytes` or none is
        left; ties go by key, lowest first. Choosing changes nothing.
        """
        if policy is not self._ordered_by:
            self._orders.clear()
            self._ordered_by = policy
        layers = self._held if layer is None else (layer,)
        going: list[ExpertKey] = []
        for _, key in heapq.merge(*(self._order(policy, one) for one in layers)):
            if excess_bytes <= 0:
                break
            if key not in pinned:
                going.append(key)
                excess_bytes -= self[key].size_bytes
        return going

    def _order(self, policy: EvictionPolicy, layer: int) -> list[Entry]:
        order = self._orders.get(layer)
        if order is None:
            order = sorted((policy.rank(held.key), held.key) for held in self._held[layer].values())
            self._orders[layer] = order
        return order
