"""Which experts of a prompt's layer are computed before others have turns."""

from __future__ import annotations

from collections.abc import Container, Sequence


def portions(experts: Sequence[int], resident: Container[int], most: int) -> list[list[int]]:
    """At most `most` portions, each ascending, alike in how many experts each computes and reads:
    what is resident is computed while the rest of its portion is read.
    """
    if most == 1:
        return [list(experts)]
    missing = [expert for expert in experts if expert not in resident]
    held = [expert for expert in experts if expert in resident]
    dealt = [sorted([*held[at::most], *missing[most - 1 - at :: most]]) for at in range(most)]
    return [portion for portion in dealt if portion]
