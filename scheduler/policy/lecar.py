"""LRU or LFU by lot, the odds learned from the regret of what was evicted too early."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Collection

from scheduler.simulate.queues import oldest

LEARNING_RATE = 0.45
REGRET_AFTER_A_CACHEFUL = 0.005  # what is left of a regret after as many uses as there are slots


class LeCar:
    """Vietri et al., "Driving cache replacement with ML-based LeCaR", HotStorage 2018.

    Rates and discount of the paper; each expert's history holds as many as the cache. Counts are
    kept across evictions, of equal counts the least recently used goes. The lots are those of the
    seed, so a replay can be repeated.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self._capacity = capacity
        self._discount = REGRET_AFTER_A_CACHEFUL ** (1 / capacity)
        self._lots = random.Random(seed)
        self._odds_of_lru = 0.5
        self._num_uses = 0
        self._residents: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._counts: Counter[int] = Counter()
        self._by_lru: OrderedDict[int, int] = OrderedDict()  # evicted by LRU, at which use
        self._by_lfu: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._residents

    def hit(self, key: int) -> None:
        self._use(key)

    def miss(self, key: int, pinned: Collection[int]) -> None:
        if key in self._by_lru:
            self._odds_of_lru = self._after_regret(self._odds_of_lru, self._by_lru.pop(key))
        elif key in self._by_lfu:
            self._odds_of_lru = 1 - self._after_regret(1 - self._odds_of_lru, self._by_lfu.pop(key))
        if len(self._residents) == self._capacity:
            self._evict(pinned)
        self._use(key)

    def _use(self, key: int) -> None:
        self._num_uses += 1
        self._counts[key] += 1
        self._residents[key] = None
        self._residents.move_to_end(key)

    def _after_regret(self, odds: float, evicted_at: int) -> float:
        """The odds of the one that evicted what was wanted after all."""
        regret = self._discount ** (self._num_uses - evicted_at)
        gain_of_other = math.exp(LEARNING_RATE * regret)
        return odds / (odds + (1 - odds) * gain_of_other)

    def _evict(self, pinned: Collection[int]) -> None:
        if self._lots.random() < self._odds_of_lru:
            going, history = oldest(self._residents, pinned), self._by_lru
        else:
            evictable = (key for key in self._residents if key not in pinned)
            going, history = min(evictable, key=self._counts.__getitem__), self._by_lfu
        assert going is not None, "an event fits, so one of its misses finds an unpinned one"
        del self._residents[going]
        history[going] = self._num_uses
        if len(history) > self._capacity:
            history.popitem(last=False)
