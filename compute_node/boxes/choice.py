"""Which box computes what of a layer, so that the last answer comes soonest.

An expert that some box has in memory is computed there; one that has to be read is read where that
ends first (as SMoE's algorithm 2 chooses among processor, disk and coarse record, and Fiddler
between moving weights and computing where they lie; here with several boxes, by measured times).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_WORTH = 0.1  # of a read: so much sooner another box must end to read what the owner could


@dataclass(frozen=True)
class Side:
    """One box. way_s: there and back; expert_s: computing one that is in memory"""

    way_s: float
    expert_s: float


@dataclass(frozen=True)
class Wanted:
    """An expert. holders: boxes that have it in memory; readers: others that may read it, its owner
    first
    """

    expert: int
    holders: Sequence[int]
    readers: Sequence[int]


def cheapest(
    wanted: Iterable[Wanted],
    sides: Mapping[int, Side],
    read_s: Callable[[int, int], float],
) -> dict[int, list[int]]:
    """By box, the experts that it computes. Each has a holder or a reader. What is not read by its
    owner takes room of another's memory, so that it must end sooner by a tenth of a read.

    read_s: of a box and an expert, how long reading takes
    """
    ends_s = {box: side.way_s for box, side in sides.items()}
    found: dict[int, list[int]] = {}
    for one in sorted(wanted, key=lambda one: (not one.holders, len(one.holders))):
        costs_s = {box: sides[box].expert_s for box in one.holders}
        if not costs_s:
            costs_s = {box: sides[box].expert_s + read_s(box, one.expert) for box in one.readers}
        box = _soonest(one, {box: ends_s[box] + cost_s for box, cost_s in costs_s.items()}, read_s)
        ends_s[box] += costs_s[box]
        found.setdefault(box, []).append(one.expert)
    return found


def _soonest(one: Wanted, ends_s: Mapping[int, float], read_s: Callable[[int, int], float]) -> int:
    """Of boxes, given when each would have computed it."""
    box = min(ends_s, key=ends_s.__getitem__)
    if one.holders or box == one.readers[0]:
        return box
    owner = one.readers[0]
    is_worth = ends_s[box] + _WORTH * read_s(owner, one.expert) < ends_s[owner]
    return box if is_worth else owner
