"""The other boxes of a main node, and which experts each computes now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners
from proto.expert import ExpertKey, ModelSpec
from proto.held_experts import ALL_EXPERTS, HeldExperts

logger = logging.getLogger(__name__)

Placement = Callable[[Sequence[float], Sequence[HeldExperts]], Owners]
"""Given the slots of each box over what an expert costs there, and the experts that its store has,
the main node's first: who owns what.
"""


_Facts = tuple[tuple[float, ...], tuple[HeldExperts, ...]]


class Boxes:
    """Any thread. An expert of a box that is away is another's, or the main node's own meanwhile; a
    box that joins gets its share without a restart. What the main node's store does not have is
    asked of boxes that rest, too, when no other has it.

    slots, held: of the main node
    """

    def __init__(self, placement: Placement, slots: int, held: HeldExperts = ALL_EXPERTS) -> None:
        self._placement, self._own_slots, self._own_held = placement, slots, held
        self.links: Sequence[WorkerLink] = ()
        self._known: tuple[_Facts, Owners] = (((), ()), placement([slots], [held]))

    def shares(self, layer: int, experts: Iterable[int]) -> dict[WorkerLink, list[int]]:
        """What other boxes compute of these, in their order."""
        found: dict[WorkerLink, list[int]] = {}
        owners, links = self._now()
        for expert in experts:
            if (link := self._first(owners, links, ExpertKey(layer, expert))) is not None:
                found.setdefault(link, []).append(expert)
        return found

    def prepare(self, layer: int, experts: Iterable[int]) -> None:
        """Steps will likely use these: boxes that compute them read them. Waits for nobody."""
        for link, part in self.shares(layer, sorted(experts)).items():
            link.prepare(layer, part)

    def __contains__(self, key: ExpertKey, /) -> bool:
        """Whether another box computes it now, or none could but another."""
        return self.lacks(key) or self._first(*self._now(), key) is not None

    def lacks(self, key: ExpertKey) -> bool:
        """Whether the main node cannot compute it."""
        return key not in self._own_held

    def warn_of_lacking(self, spec: ModelSpec) -> None:
        """Log it when no box that is up has what the main node's store does not have."""
        keys = (ExpertKey(layer, e) for layer in spec.moe_layers for e in range(spec.num_experts))
        lacking = [key for key in keys if self.lacks(key)]
        found = self._now()
        left = [key for key in lacking if self._first(*found, key) is None]
        if left:
            facts = {"experts": len(left), "first": str(left[0])}
            logger.warning("no box has these experts", extra=facts)

    def _now(self) -> tuple[Owners, Sequence[WorkerLink]]:
        """Who owns what among the links that there are."""
        links = self.links
        facts = tuple(link.slots / link.cost for link in links), tuple(link.held for link in links)
        known, owners = self._known
        if facts != known:
            slots, held = facts
            owners = self._placement((self._own_slots, *slots), (self._own_held, *held))
            self._known = facts, owners
        return owners, links

    def _first(
        self, owners: Owners, links: Sequence[WorkerLink], key: ExpertKey
    ) -> WorkerLink | None:
        """None: the main node's, or nobody's."""
        if not links:
            return None
        able = owners.owners(key)
        for number in able:
            if number == 0:
                return None
            if links[number - 1].is_up:
                return links[number - 1]
        if not self.lacks(key):
            return None
        return next((links[n - 1] for n in able if n and links[n - 1].is_joined), None)
