"""The experts a node holds, each layer in the order in which a policy would give them up."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from compute_node.cache.occupancy import Coming, Occupancy
from compute_node.cache.policies.policy import EvictionPolicy
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey

Entry = tuple[float, ExpertKey]


@dataclass(frozen=True)
class Wanted:
    """Room for what is coming, within `num_slots` of one layer, or of all.

    replaced: go first, whether or not that is enough
    """

    coming: Coming
    num_slots: int
    layer: int | None = None
    replaced: Sequence[ExpertKey] = ()

    def excess(self, held: Occupancy) -> int:
        """Slots too many, once what is coming has come beside what is held."""
        return held.slots_with(self.coming) - self.num_slots


class Residents:
    """One record of each, exact or small. Sorts a layer only when something changed in it: a pool
    of thousands is not looked through at every miss.

    num_parts: small records that one slot of the store holds
    """

    def __init__(self, layers: Iterable[int], num_parts: int = 1) -> None:
        self._held: dict[int, dict[int, Borrowed]] = {layer: {} for layer in layers}
        self._orders: dict[int, list[Entry]] = {}
        self._ordered_by: EvictionPolicy | None = None
        self._occupancy = Occupancy(num_parts)
        self._num_held = 0

    def __len__(self) -> int:
        return self._num_held

    def __contains__(self, key: ExpertKey) -> bool:
        return key.expert in self._held[key.layer]

    def __getitem__(self, key: ExpertKey) -> Borrowed:
        return self._held[key.layer][key.expert]

    def get(self, key: ExpertKey) -> Borrowed | None:
        return self._held[key.layer].get(key.expert)

    def held_in(self, layer: int) -> list[int]:
        """Experts of one layer, for any thread: the interpreter copies them in one step."""
        return list(self._held[layer])

    def occupancy(self, layer: int | None = None) -> Occupancy:
        """Of one layer, where all are exact, or of all. A copy."""
        if layer is None:
            return self._occupancy.copy()
        return Occupancy(num_exact=len(self._held[layer]))

    def slots_with(self, coming: Coming, layer: int | None = None) -> int:
        """Bound by one layer's experts, or by all, once these have come as well."""
        held = self._occupancy if layer is None else self.occupancy(layer)
        return held.slots_with(coming)

    def insert(self, borrowed: Borrowed) -> None:
        key = borrowed.key
        assert key not in self, "of an expert one record is held"
        self._held[key.layer][key.expert] = borrowed
        self._num_held += 1
        self._occupancy.add(borrowed)
        self._orders.pop(key.layer, None)

    def evict(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            self._occupancy.remove(self._held[key.layer].pop(key.expert))
            self._num_held -= 1
            self._orders.pop(key.layer, None)

    def clear(self) -> None:
        for layer in self._held.values():
            layer.clear()
        self._orders.clear()
        self._occupancy = Occupancy(self._occupancy.num_parts)
        self._num_held = 0

    def on_step(self, layer: int) -> None:
        """Policies rank the experts of this layer anew."""
        self._orders.pop(layer, None)

    def victims(
        self, policy: EvictionPolicy, wanted: Wanted, pinned: Collection[ExpertKey] = ()
    ) -> tuple[list[ExpertKey], int]:
        """Those to give up next; ties go by key, lowest first. Choosing changes nothing.

        Returns them, and how many slots are still missing when all that may go has gone.
        """
        left, going = self.occupancy(wanted.layer), list[ExpertKey]()
        for key in wanted.replaced:
            left.remove(self[key])
        for key in self._in_order(policy, wanted.layer):
            if wanted.excess(left) <= 0:
                break
            if key not in pinned and key not in wanted.replaced:
                left.remove(self[key])
                going.append(key)
        missing = max(0, wanted.excess(left))
        if not missing:
            going = self._needed(going, left, wanted)
        return [*wanted.replaced, *going], missing

    def _needed(self, going: list[ExpertKey], left: Occupancy, wanted: Wanted) -> list[ExpertKey]:
        """Without small ones whose slot stays bound by others: going, they make no room for an
        exact record. left: once all have gone
        """
        kept = set[ExpertKey]()
        for key in reversed(going):
            if not self[key].is_exact:
                left.add(self[key])
                if wanted.excess(left) <= 0:
                    kept.add(key)
                else:
                    left.remove(self[key])
        return [key for key in going if key not in kept]

    def _in_order(self, policy: EvictionPolicy, layer: int | None) -> Iterator[ExpertKey]:
        """The first to give up first."""
        if policy is not self._ordered_by:
            self._orders.clear()
            self._ordered_by = policy
        layers = self._held if layer is None else (layer,)
        return (key for _, key in heapq.merge(*(self._order(policy, one) for one in layers)))

    def _order(self, policy: EvictionPolicy, layer: int) -> list[Entry]:
        order = self._orders.get(layer)
        if order is None:
            order = sorted((policy.rank(held.key), held.key) for held in self._held[layer].values())
            self._orders[layer] = order
        return order
