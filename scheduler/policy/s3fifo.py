"""Three FIFO queues: newcomers prove themselves in a small one, or soon leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from scheduler.simulate.queues import oldest

Counts = OrderedDict[int, int]  # uses since it came, oldest first

MAX_COUNT = 3  # two bits
PROMOTED = 2  # uses in the small queue that lead to the main one
SMALL_SHARE = 0.1
GHOST_SHARE = 0.9


class S3Fifo:
    """Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

    The small queue holds a tenth, one slot at least. What pins add: the head of a queue is the
    oldest that is not pinned, and the other queue is tried when there is none.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small_slots = max(1, int(capacity * SMALL_SHARE))
        self._ghost_slots = int(capacity * GHOST_SHARE)
        self._small: Counts = OrderedDict()
        self._main: Counts = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._small or key in self._main

    def hit(self, key: int) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, MAX_COUNT)

    def miss(self, key: int, pinned: Collection[int]) -> None:
        is_known = key in self._ghosts
        self._ghosts.pop(key, None)
        while len(self._small) + len(self._main) >= self._capacity:
            self._evict(pinned)
        (self._main if is_known else self._small)[key] = 0

    def _evict(self, pinned: Collection[int]) -> None:
        if len(self._small) >= self._small_slots:
            self._evict_small(pinned) or self._evict_main(pinned)
        else:
            self._evict_main(pinned) or self._evict_small(pinned)

    def _evict_small(self, pinned: Collection[int]) -> bool:
        """Whether one went; those that were used move to the main queue on the way."""
        while (key := oldest(self._small, pinned)) is not None:
            if self._small.pop(key) < PROMOTED:
                self._remember(key)
                return True
            self._main[key] = 0
        return False

    def _evict_main(self, pinned: Collection[int]) -> bool:
        """Whether one went; those that were used get another round."""
        while (key := oldest(self._main, pinned)) is not None:
            count = self._main.pop(key)
            if not count:
                return True
            self._main[key] = count - 1
        return False

    def _remember(self, key: int) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self._ghost_slots:
            self._ghosts.popitem(last=False)
