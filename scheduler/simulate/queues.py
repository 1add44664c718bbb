"""Replays events through policies that keep their residents in queues of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import numpy as np

from proto.access import DecodeAccess
from scheduler.simulate.slots import Hits


class QueuePolicy(Protocol):
    """Residents of one layer, or of one pool, by key. It holds at most its capacity of them."""

    def __contains__(self, key: int) -> bool:
        """Whether it is resident."""
        ...

    def hit(self, key: int) -> None:
        """A resident was used."""
        ...

    def miss(self, key: int, pinned: Collection[int]) -> None:
        """Make it resident, at the cost of another when full; never of one that is pinned."""
        ...


class QueueCache:
    """One policy a layer, or one for all; one (step, layer) is one event.

    An event's experts are all looked up before the first of them changes anything. Then the
    policy gets its hits, then its misses, by number each, so that the order in a trace does not
    matter.

    make:   a policy for layer 0, 1, ...; a pool is made as layer 0
    pooled: keys are then places in the flat [L, E]
    """

    def __init__(
        self, make: Callable[[int], QueuePolicy], shape: tuple[int, int], *, pooled: bool
    ) -> None:
        num_layers, self._num_experts = shape
        self._policies = [make(0)] * num_layers if pooled else [*map(make, range(num_layers))]

    def step(self, event: DecodeAccess) -> Hits:
        first = np.arange(len(event.topk_ids))[:, None] * self._num_experts
        places = (first + event.topk_ids).tolist()
        return np.array(
            [_event(policy, keys) for policy, keys in zip(self._policies, places, strict=True)]
        )


def _event(policy: QueuePolicy, keys: list[int]) -> list[bool]:
    hits = [key in policy for key in keys]
    in_order = sorted(zip(keys, hits, strict=True))
    for key, is_hit in in_order:
        if is_hit:
            policy.hit(key)
    for key, is_hit in in_order:
        if not is_hit:
            policy.miss(key, keys)
    return hits


def oldest(queue: Iterable[int], pinned: Collection[int]) -> int | None:
    """The first that may go; None when there is none."""
    return next((key for key in queue if key not in pinned), None)
