"""The other boxes of a main node, and which experts each computes now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from compute_node.boxes.choice import Side, Wanted, cheapest
from compute_node.boxes.doubles import Doubles
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners
from compute_node.boxes.times import Times
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


class InMemory(Protocol):
    """Experts of the main node. Any thread asks."""

    def __contains__(self, key: ExpertKey, /) -> bool: ...


class Here(Protocol):
    """The main node's part in a layer's step."""

    def has(self, expert: int) -> bool:
        """Whether it is in memory, in as many bits as the step needs."""

    def read_s(self, expert: int) -> float:
        """Reading it takes so long; 0: not known."""


class Boxes:
    """Any thread. An expert of a box that is away is another's, or the main node's own meanwhile; a
    box that joins gets its share without a restart. What the main node's store does not have is
    asked of boxes that rest, too, when no other has it.

    slots, held: of the main node; new_doubles: None: every expert has one owner
    here: what the main node has in memory; given: an expert goes where it costs least, not to its
          owner in any case
    times: of the main node
    """

    def __init__(
        self,
        placement: Placement,
        slots: int,
        held: HeldExperts = ALL_EXPERTS,
        new_doubles: NewDoubles | None = None,
        here: InMemory | None = None,
    ) -> None:
        self._placement, self._own_slots, self._own_held = placement, slots, held
        self._new_doubles, self._here = new_doubles, here
        self.times = Times()
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

    def cheapest(
        self, layer: int, experts: Sequence[int], here: Here
    ) -> dict[WorkerLink, list[int]]:
        """As `shares`, for a decode step: where it costs least, if that is known."""
        if self._here is None:
            return self.shares(layer, experts)
        owners, _, links = self._now()
        numbers = [number for number, link in enumerate(links, 1) if link.is_up]
        holders = {
            expert: [0] * here.has(expert)
            + [n for n in numbers if links[n - 1].residents.has(layer, expert)]
            for expert in experts
        }
        if any(len(boxes) != 1 for boxes in holders.values()):
            sides = {0: Side(0.0, self.times.expert_s)}
            sides |= {n: Side(links[n - 1].times.way_s, links[n - 1].expert_s) for n in numbers}
            return self._chosen(layer, holders, here, sides, owners, links)
        found: dict[WorkerLink, list[int]] = {}
        for expert, [box] in holders.items():
            if box:
                found.setdefault(links[box - 1], []).append(expert)
        return found

    def _chosen(
        self,
        layer: int,
        holders: Mapping[int, Sequence[int]],
        here: Here,
        sides: Mapping[int, Side],
        owners: Owners,
        links: Sequence[WorkerLink],
    ) -> dict[WorkerLink, list[int]]:
        """Where some are in no memory, or in two. holders: of each expert, by number, the
        main node's 0; sides: of boxes that are up
        """

        def read_s(box: int, expert: int) -> float:
            return links[box - 1].read_s if box else here.read_s(expert)

        def readers(expert: int) -> list[int]:
            key = ExpertKey(layer, expert)
            first = self._first(owners, links, key)
            owner = links.index(first) + 1 if first is not None else 0
            if not read_s(owner, expert):
                return [owner]
            able = (box for box in owners.able(key) if box != owner and box in sides)
            return [owner, *(box for box in able if read_s(box, expert))]

        wanted = [Wanted(expert, boxes, readers(expert)) for expert, boxes in holders.items()]
        if any(box not in sides for one in wanted for box in one.readers):  # one that rests
            return self.shares(layer, holders)
        chosen = cheapest(wanted, sides, read_s)
        return {links[box - 1]: sorted(part) for box, part in chosen.items() if box}

    def note(self, layer: int, experts: Collection[int]) -> Sequence[int]:
        """A decode step used these. What a worker now owns, too, it reads in the background; what
        the main node does, is returned. The compute thread's.
        """
        _, doubles, links = self._now()
        moved = doubles.note(layer, experts) if doubles is not None else {}
        for box, part in moved.items():
            if box and links[box - 1].is_up:
                links[box - 1].move_in(layer, sorted(part))
        return sorted(moved.get(0, ()))

    def prepare(self, layer: int, experts: Iterable[int]) -> None:
        """Steps will likely use these: boxes that compute them read them. Waits for nobody."""
        held: dict[WorkerLink, list[int]] = {}
        left = []
        for expert in sorted(experts):
            key = ExpertKey(layer, expert)
            if self._here is not None and key in self._here:
                continue
            if (link := self._holder(key)) is not None:
                held.setdefault(link, []).append(expert)
            else:
                left.append(expert)
        for link, part in self.shares(layer, left).items():
            held.setdefault(link, []).extend(part)
        for link, part in held.items():
            link.prepare(layer, sorted(part))

    def __contains__(self, key: ExpertKey, /) -> bool:
        """Whether another box computes it now, or none could but another."""
        if self.lacks(key) or self._holder(key) is not None:
            return True
        owners, _, links = self._now()
        return self._first(owners, links, key) is not None

    def needs_no_read(self, key: ExpertKey) -> bool:
        """On another box. Where groups take layers in turn, what is read there is read ahead."""
        return self._holder(key) is not None if self._here is not None else key in self

    def _holder(self, key: ExpertKey) -> WorkerLink | None:
        """A box that has it in memory, where that counts."""
        if self._here is None:
            return None
        holders = (link for link in self.links if link.residents.has(key.layer, key.expert))
        return next((link for link in holders if link.is_up), None)

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
