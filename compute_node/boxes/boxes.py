"""The other boxes of a main node, and which experts each computes now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from compute_node.boxes.doubles import Doubles
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners
from proto.expert import ExpertKey, ModelSpec
from proto.held_experts import ALL_EXPERTS, HeldExperts
from proto.stats import gauge

logger = logging.getLogger(__name__)

Placement = Callable[[Sequence[float], Sequence[HeldExperts]], Owners]
"""Given the slots of each box over what an expert costs there, and the experts that its store has,
the main node's first: who owns what.
"""

NewDoubles = Callable[[Owners, Sequence[int]], Doubles]
"""Given the first owners and the slots of each box: what has a second one."""

_Facts = tuple[tuple[float, ...], tuple[HeldExperts, ...]]
_Known = tuple[_Facts, Owners, Doubles | None]


class Boxes:
    """Any thread. An expert of a box that is away is another's, or the main node's own meanwhile; a
    box that joins gets its share without a restart. What the main node's store does not have is
    asked of boxes that rest, too, when no other has it.

    slots, held: of the main node; new_doubles: None: every expert has one owner
    """

    def __init__(
        self,
        placement: Placement,
        slots: int,
        held: HeldExperts = ALL_EXPERTS,
        new_doubles: NewDoubles | None = None,
    ) -> None:
        self._placement, self._own_slots, self._own_held = placement, slots, held
        self._new_doubles = new_doubles
        self.links: Sequence[WorkerLink] = ()
        self._known: _Known = (((), ()), placement([slots], [held]), None)

    @property
    @gauge(
        "flashmoe_node_doubled_experts",
        "Experts that either of two boxes computes, because they are used most",
        key="doubled",
    )
    def num_doubled(self) -> int:
        _, _, doubles = self._known
        return doubles.num_doubled if doubles is not None else 0

    def shares(self, layer: int, experts: Iterable[int]) -> dict[WorkerLink, list[int]]:
        """What other boxes compute of these, ascending. An expert with two owners is that one's
        which has less to do.
        """
        found: dict[WorkerLink | None, list[int]] = {}
        twice: list[tuple[int, WorkerLink | None, WorkerLink | None]] = []
        owners, doubles, links = self._now()
        for expert in experts:
            key = ExpertKey(layer, expert)
            link = self._first(owners, links, key)
            number = doubles.second(key) if doubles is not None else None
            if number is None or (number and not links[number - 1].is_up):
                found.setdefault(link, []).append(expert)
            else:
                twice.append((expert, link, links[number - 1] if number else None))
        for expert, *able in twice:
            link = min(able, key=lambda one: len(found.get(one, ())))
            found.setdefault(link, []).append(expert)
        return {link: sorted(part) for link, part in found.items() if link is not None}

    def note(self, layer: int, experts: Collection[int]) -> None:
        """A decode step used these. The compute thread's."""
        _, doubles, _ = self._now()
        if doubles is not None:
            doubles.note(layer, experts)

    def prepare(self, layer: int, experts: Iterable[int]) -> None:
        """Steps will likely use these: boxes that compute them read them. Waits for nobody."""
        for link, part in self.shares(layer, sorted(experts)).items():
            link.prepare(layer, part)

    def __contains__(self, key: ExpertKey, /) -> bool:
        """Whether another box computes it now, or none could but another."""
        owners, _, links = self._now()
        return self.lacks(key) or self._first(owners, links, key) is not None

    def lacks(self, key: ExpertKey) -> bool:
        """Whether the main node cannot compute it."""
        return key not in self._own_held

    def lacking(self, layer: int, experts: Iterable[int]) -> set[int]:
        """Those of these that the main node cannot compute."""
        if self._own_held.is_all:
            return set()
        return {expert for expert in experts if self.lacks(ExpertKey(layer, expert))}

    def warn_of_lacking(self, spec: ModelSpec) -> None:
        """Log it when no box that is up has what the main node's store does not have."""
        keys = (ExpertKey(layer, e) for layer in spec.moe_layers for e in range(spec.num_experts))
        lacking = [key for key in keys if self.lacks(key)]
        owners, _, links = self._now()
        left = [key for key in lacking if self._first(owners, links, key) is None]
        if left:
            facts = {"experts": len(left), "first": str(left[0])}
            logger.warning("no box has these experts", extra=facts)

    def _now(self) -> tuple[Owners, Doubles | None, Sequence[WorkerLink]]:
        """Who owns what among the links that there are."""
        links = self.links
        facts = tuple(link.slots / link.cost for link in links), tuple(link.held for link in links)
        known, owners, doubles = self._known
        if facts != known:
            slots, held = facts
            owners = self._placement((self._own_slots, *slots), (self._own_held, *held))
            if self._new_doubles is not None:
                each = [self._own_slots, *(link.slots for link in links)]
                doubles = self._new_doubles(owners, each)
            self._known = facts, owners, doubles
        return owners, doubles, links

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
