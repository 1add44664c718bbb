"""What a main node says of its own memory when it chooses a box.

Planted faults seen red: what a guess has read not counted, what was moved in not counted, a small
record taken for an exact one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from compute_node.moe.local import HereOf
from proto.expert import ExpertKey

LAYER = 3


class Cache:
    """Expert 0 exact, 1 small."""

    waits, capacity = SimpleNamespace(read_s=0.1), SimpleNamespace(num_parts=4)

    def __contains__(self, key: ExpertKey) -> bool:
        return key.expert == 0

    def holds(self, key: ExpertKey) -> bool:
        return key.expert < 2


def test_what_needs_no_read() -> None:
    foreseen, moved = {ExpertKey(LAYER, 4)}, {ExpertKey(LAYER, 5)}
    here = HereOf(LAYER, cast(Any, Cache()), cast(Any, foreseen), moved, small=())
    assert [expert for expert in range(8) if here.has(expert)] == [0, 4, 5]
    coarse = HereOf(LAYER, cast(Any, Cache()), cast(Any, set()), (), small={1, 2})
    assert [expert for expert in range(8) if coarse.has(expert)] == [0, 1]
    assert (coarse.read_s(2), coarse.read_s(3)) == (0.025, 0.1)
