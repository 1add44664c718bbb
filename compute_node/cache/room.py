"""Which residents go when room is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from compute_node.cache.capacity import Capacity
from compute_node.cache.latest_use import LatestUse
from compute_node.cache.occupancy import Coming
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.cache.residents import Residents, Wanted
from proto.expert import ExpertKey, RecordKey

_SPARED_RATIO = 0.5  # of the slots, that hold what answers use while a prompt is computed


@dataclass
class Room:
    """Of one cache. One thread.

    num_spare: slots of the store beside those that nodes may borrow, where guesses lie
    under_way: misses that were asked for and have not come
    used:      by the layer that a step is at
    used_in:   by layer, what its latest step used
    answers:   what the answers that are under way used
    """

    capacity: Capacity
    residents: Residents
    chooser: PolicyChooser
    num_spare: int = 0
    under_way: set[RecordKey] = field(default_factory=set)
    used: Sequence[ExpertKey] = ()
    used_in: dict[int, Sequence[ExpertKey]] = field(default_factory=dict)
    answers: LatestUse = field(default_factory=LatestUse)
    _expected: dict[int, frozenset[ExpertKey]] = field(default_factory=dict)
    _spares_answers: bool = False

    def __post_init__(self) -> None:
        layers = self.capacity.moe_layers
        self.slots = {layer: self.capacity.layer_slots(layer) for layer in layers}

    def reach(self, layer: int, used: Sequence[ExpertKey]) -> None:
        """A step is at `layer`: what was expected there is known now."""
        self.used = self.used_in[layer] = used
        self._expected.pop(layer, None)

    def leave(self) -> None:
        """No step is at any layer: what the latest one used may go for guesses."""
        self.used = ()

    def expect(self, layer: int, keys: Collection[ExpertKey]) -> None:
        """Steps will soon use these of a later layer: they go last."""
        self._expected[layer] = frozenset(keys)

    @contextmanager
    def sparing_answers(self) -> Iterator[None]:
        """For a prompt: what answers used last goes only if nothing else is left, up to half of the
        slots.
        """
        self._spares_answers = True
        try:
            yield
        finally:
            self._spares_answers = False

    def for_misses(
        self, layer: int, misses: Collection[RecordKey], pinned: Collection[ExpertKey]
    ) -> list[ExpertKey]:
        """What goes so that `misses` fit beside what is under way: never what is pinned, what is
        expected only if nothing else is left. A small record whose exact one is a miss goes, too.
        """
        replaced = [key.expert for key in misses if key.expert in self.residents]
        coming = Coming.of((*self.under_way, *misses))
        if not replaced and self._fits(layer, coming):
            return []
        wanted = Wanted(coming, self.slots[layer], self._scope(layer), replaced)
        policy, kept = self.chooser.choose(), self._all_expected().union(pinned)
        if self._spares_answers:
            most = int(_SPARED_RATIO * self.slots[layer])
            kept |= self.answers.latest(most, self._scope(layer))
        going, num_missing = self.residents.victims(policy, wanted, kept)
        if num_missing:
            going, _ = self.residents.victims(policy, wanted, pinned)
        return going

    def for_guesses(self, layer: int, num_guesses: int) -> tuple[list[ExpertKey], int]:
        """What goes so that the store can hold that many guesses that nobody has borrowed yet, and
        how many of them still find no room. What a step uses or is expected to use stays.
        """
        under_way = Coming.of(self.under_way)
        num_exact = under_way.num_exact + num_guesses - self.num_spare
        coming = Coming(num_exact, under_way.num_small)
        if self._fits(layer, coming):
            return [], 0
        wanted = Wanted(coming, self.slots[layer], self._scope(layer))
        kept = self._all_expected().union(self.used)
        return self.residents.victims(self.chooser.choose(), wanted, kept)

    def for_loans(self, layer: int, num_exact: int) -> list[ExpertKey]:
        """What goes so that as many exact records fit for a while, beside what is under way."""
        under_way = Coming.of(self.under_way)
        coming = Coming(under_way.num_exact + num_exact, under_way.num_small)
        if self._fits(layer, coming):
            return []
        wanted = Wanted(coming, self.slots[layer], self._scope(layer))
        going, _ = self.residents.victims(self.chooser.choose(), wanted)
        return going

    def has_free_slot(self, layer: int) -> bool:
        """Whether another exact record of `layer` fits, and nothing has to go for it."""
        coming = Coming.of(self.under_way)
        return self._fits(layer, Coming(coming.num_exact + 1, coming.num_small))

    def of_empty(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """The first of `keys` that an empty cache can take."""
        num_left, room = self.capacity.slots, dict(self.slots)
        chosen: list[ExpertKey] = []
        for key in keys:
            if min(room[key.layer], num_left) > 0:
                room[key.layer] -= 1
                num_left -= 1
                chosen.append(key)
        return chosen

    def _fits(self, layer: int, coming: Coming) -> bool:
        return self.residents.slots_with(coming, self._scope(layer)) <= self.slots[layer]

    def _scope(self, layer: int) -> int | None:
        """Whose residents go for the sake of `layer`."""
        return None if self.capacity.pooled else layer

    def _all_expected(self) -> set[ExpertKey]:
        return {key for keys in self._expected.values() for key in keys}
