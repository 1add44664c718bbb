"""Adaptive replacement cache: recency and frequency, balanced by what was evicted too early."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from scheduler.simulate.queues import oldest

Queue = OrderedDict[int, None]  # least recently used first


class Arc:
    """Megiddo & Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.

    T1 and T2, their ghosts B1 and B2, and the target p of the paper, with its cases II to IV. What
    pins add: REPLACE takes the least recently used that is not pinned, from the other queue if need
    be.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._once: Queue = OrderedDict()  # T1
        self._often: Queue = OrderedDict()  # T2
        self._once_ghosts: Queue = OrderedDict()  # B1
        self._often_ghosts: Queue = OrderedDict()  # B2
        self._target = 0.0  # p, how many residents should be of T1

    def __contains__(self, key: int) -> bool:
        return key in self._once or key in self._often

    def hit(self, key: int) -> None:
        (self._once if key in self._once else self._often).pop(key)
        self._often[key] = None

    def miss(self, key: int, pinned: Collection[int]) -> None:
        num_once, num_often = len(self._once_ghosts), len(self._often_ghosts)
        if key in self._once_ghosts:
            self._target = min(self._capacity, self._target + max(1.0, num_often / num_once))
            self._replace(pinned)
            del self._once_ghosts[key]
            self._often[key] = None
        elif key in self._often_ghosts:
            self._target = max(0.0, self._target - max(1.0, num_once / num_often))
            self._replace(pinned, of_often=True)
            del self._often_ghosts[key]
            self._often[key] = None
        else:
            self._make_room(pinned)
            self._once[key] = None

    def _make_room(self, pinned: Collection[int]) -> None:
        """Case IV: nothing is known of the newcomer."""
        num_once = len(self._once) + len(self._once_ghosts)
        num_known = num_once + len(self._often) + len(self._often_ghosts)
        if len(self._once) == self._capacity:
            going = oldest(self._once, pinned)
            assert going is not None, "an event fits, so one of its misses finds an unpinned one"
            del self._once[going]
            return
        if num_once == self._capacity:
            self._once_ghosts.popitem(last=False)
        elif num_known == 2 * self._capacity:
            self._often_ghosts.popitem(last=False)
        if num_known >= self._capacity:
            self._replace(pinned)

    def _replace(self, pinned: Collection[int], *, of_often: bool = False) -> None:
        """of_often: the newcomer is in B2, which tips a balance that is even."""
        queues = [(self._once, self._once_ghosts), (self._often, self._often_ghosts)]
        size = len(self._once)
        if not size or size < self._target or (size == self._target and not of_often):
            queues.reverse()
        for residents, ghosts in queues:
            going = oldest(residents, pinned)
            if going is not None:
                del residents[going]
                ghosts[going] = None
                return
