"""The other boxes of a main node, and which experts each computes now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS, HeldExperts

Placement = Callable[[Sequence[float], Sequence[HeldExperts]], Owners]
"""Given the slots of each box over what an expert costs there, and the experts that its store has,
the main node's first: who owns what.
"""


_Facts = tuple[tuple[float, ...], tuple[HeldExperts, ...]]


class Boxes:
    """Any thread. An expert of a box that is away is another's, or the main node's own meanwhile; a
    box that joins gets its share without a restart.

    slots, held: of the main node
    """

    def __init__(self, placement: Placement, slots: int, held: HeldExperts = ALL_EXPERTS) -> None:
        self._placement, self._own = placement, (slots, held)
        self.links: Sequence[WorkerLink] = ()
        self._known: tuple[_Facts, Owners] = (((), ()), placement([slots], [held]))

    def shares(self, layer: int, experts: Iterable[int]) -> dict[WorkerLink, list[int]]:
        """What other boxes compute of these, in their order."""
        found: dict[WorkerLink, list[int]] = {}
        owners, links = self._now()
        for expert in experts:
            if (link := _first_up(owners, links, ExpertKey(layer, expert))) is not None:
                found.setdefault(link, []).append(expert)
        return found

    def prepare(self, layer: int, experts: Iterable[int]) -> None:
        """Steps will likely use these: boxes that compute them read them. Waits for nobody."""
        for link, part in self.shares(layer, sorted(experts)).items():
            link.prepare(layer, part)

    def __contains__(self, key: ExpertKey, /) -> bool:
        """Whether another box computes it now."""
        owners, links = self._now()
        return _first_up(owners, links, key) is not None

    def _now(self) -> tuple[Owners, Sequence[WorkerLink]]:
        """Who owns what among the links that there are."""
        links = self.links
        facts = tuple(link.slots / link.cost for link in links), tuple(link.held for link in links)
        known, owners = self._known
        if facts != known:
            (slots, held), (own_slots, own_held) = facts, self._own
            owners = self._placement((own_slots, *slots), (own_held, *held))
            self._known = facts, owners
        return owners, links


def _first_up(owners: Owners, links: Sequence[WorkerLink], key: ExpertKey) -> WorkerLink | None:
    """None: the main node's."""
    if not links:
        return None
    for number in owners.owners(key):
        if number == 0:
            return None
        if links[number - 1].is_up:
            return links[number - 1]
    return None
