"""Which box computes what of a layer, so that the last answer comes soonest.

An expert that some box has in memory is computed there; one that has to be read is read where that
ends first (as SMoE's algorithm 2 chooses among processor, disk and coarse record, and Fiddler
between moving weights and computing where they lie; here with several boxes, by measured times).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_WORTH = 0.5  # of a read, that another box's disk must have it sooner than the owner's


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
    """By box, the experts that it computes. Each has a holder or a reader.

    Who reads an expert goes by disks alone: what is read takes room of that box's memory, and a box
    that computes a little faster would be given all. Of two holders the less busy computes.

    read_s: of a box and an expert, how long reading takes
    """
    busy_s = {box: side.way_s for box, side in sides.items()}
    reads_s = busy_s.copy()
    found: dict[int, list[int]] = {}
    for one in sorted(wanted, key=lambda one: (not one.holders, len(one.holders))):
        if one.holders:
            box = min(one.holders, key=lambda box: busy_s[box] + sides[box].expert_s)
        else:
            ends_s = {box: reads_s[box] + read_s(box, one.expert) for box in one.readers}
            box = _reader(one, ends_s, _WORTH * read_s(one.readers[0], one.expert))
            reads_s[box] = ends_s[box]
        busy_s[box] += sides[box].expert_s
        found.setdefault(box, []).append(one.expert)
    return found


def _reader(one: Wanted, ends_s: Mapping[int, float], worth_s: float) -> int:
    """The owner, or who has it so much sooner. ends_s: when each would have read it"""
    soonest, owner = min(ends_s, key=ends_s.__getitem__), one.readers[0]
    return soonest if ends_s[soonest] + worth_s < ends_s[owner] else owner
