"""The other boxes of a main node, and which experts each computes now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners
from proto.expert import ExpertKey


class Boxes:
    """One thread. An expert of a box that is away is the main node's own meanwhile; a box that
    joins gets its share without a restart.

    num_experts: of a layer; slots: of the main node
    """

    def __init__(self, num_experts: int, slots: int) -> None:
        self._num_experts, self._own_slots = num_experts, slots
        self.links: Sequence[WorkerLink] = ()
        self._slots: tuple[int, ...] = ()
        self._owners: Owners

    def shares(self, layer: int, experts: Iterable[int]) -> dict[WorkerLink, list[int]]:
        """What other boxes compute of these, in their order."""
        found: dict[WorkerLink, list[int]] = {}
        for expert in experts:
            if (link := self._owner(ExpertKey(layer, expert))) is not None:
                found.setdefault(link, []).append(expert)
        return found

    def __contains__(self, key: ExpertKey, /) -> bool:
        """Whether another box computes it now."""
        return self._owner(key) is not None

    def _owner(self, key: ExpertKey) -> WorkerLink | None:
        if not self.links:
            return None
        slots = tuple(link.slots for link in self.links)
        if slots != self._slots:
            self._slots = slots
            self._owners = Owners(self._num_experts, (self._own_slots, *slots))
        owner = self._owners.owner(key)
        if owner == 0 or not self.links[owner - 1].is_up:
            return None
        return self.links[owner - 1]
