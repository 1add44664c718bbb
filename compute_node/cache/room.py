"""Which residents go when room is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from compute_node.cache.capacity import Capacity
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.cache.residents import Residents
from proto.expert import ExpertKey


@dataclass
class Room:
    """Of one cache. One thread.

    num_spare: slots of the store beside those that nodes may borrow, where guesses lie
    under_way: misses that were asked for and have not come
    used:      by the layer that a step is at
    """

    capacity: Capacity
    residents: Residents
    chooser: PolicyChooser
    num_spare: int = 0
    under_way: set[ExpertKey] = field(default_factory=set)
    used: Sequence[ExpertKey] = ()
    _expected: dict[int, frozenset[ExpertKey]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = self.capacity.moe_layers
        self.layer_bytes = {layer: self.capacity.layer_bytes(layer) for layer in layers}

    def reach(self, layer: int, used: Sequence[ExpertKey]) -> None:
        """A step is at `layer`: what was expected there is known now."""
        self.used = used
        self._expected.pop(layer, None)

    def expect(self, layer: int, keys: Collection[ExpertKey]) -> None:
        """Steps will soon use these of a later layer: they go last."""
        self._expected[layer] = frozenset(keys)

    def for_misses(
        self, layer: int, misses: Sequence[ExpertKey], pinned: Collection[ExpertKey]
    ) -> list[ExpertKey]:
        """What goes so that `misses` fit beside what is under way: never what is pinned, what is
        expected only if nothing else is left.
        """
        excess_bytes = self._excess_bytes(layer, len(misses))
        if excess_bytes <= 0:
            return []
        policy, scope = self.chooser.choose(), self._scope(layer)
        kept = self._all_expected().union(pinned)
        going = self.residents.victims(policy, excess_bytes, kept, scope)
        if sum(self.residents[key].size_bytes for key in going) < excess_bytes:
            going = self.residents.victims(policy, excess_bytes, pinned, scope)
        return going

    def for_guesses(self, layer: int, num_guesses: int) -> tuple[list[ExpertKey], int]:
        """What goes so that the store can hold that many guesses that nobody has borrowed yet, and
        how many of them still find no room. What a step uses or is expected to use stays.
        """
        expert_bytes = self.capacity.expert_bytes
        excess_bytes = self._excess_bytes(layer, num_guesses - self.num_spare)
        if excess_bytes <= 0:
            return [], 0
        kept = self._all_expected().union(self.used)
        scope = self._scope(layer)
        going = self.residents.victims(self.chooser.choose(), excess_bytes, kept, scope)
        found_bytes = sum(self.residents[key].size_bytes for key in going)
        return going, max(0, -(-(excess_bytes - found_bytes) // expert_bytes))

    def of_empty(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """The first of `keys` that an empty cache can take."""
        expert_bytes, left_bytes = self.capacity.expert_bytes, self.capacity.capacity_bytes
        room_bytes = dict(self.layer_bytes)
        chosen: list[ExpertKey] = []
        for key in keys:
            if min(room_bytes[key.layer], left_bytes) >= expert_bytes:
                room_bytes[key.layer] -= expert_bytes
                left_bytes -= expert_bytes
                chosen.append(key)
        return chosen

    def _excess_bytes(self, layer: int, num_coming: int) -> int:
        """What is too much once that many more have come."""
        num_coming += len(self.under_way)
        held_bytes = self.residents.held_bytes(self._scope(layer))
        wanted_bytes = held_bytes + num_coming * self.capacity.expert_bytes
        return wanted_bytes - self.layer_bytes[layer]

    def _scope(self, layer: int) -> int | None:
        """Whose residents go for the sake of `layer`."""
        return None if self.capacity.pooled else layer

    def _all_expected(self) -> set[ExpertKey]:
        return {key for keys in self._expected.values() for key in keys}
