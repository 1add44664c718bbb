"""The experts that a box has in memory: one pool, which evicts as a node and a worker do when
nobody advises them.

A layer's experts of one step are one event: all are looked up, and none of them goes while room is
made for those that miss.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence

from compute_node.cache.policies.decayed import Decayed
from deploy.simulator.disk import Disk
from proto import errors
from proto.expert import ExpertKey


class ExpertCache:
    """slots: experts that it holds; at least as many as one layer of a token takes

    num_hits, num_misses: so far; what was read ahead in time and what is under way are hits
    Raises MemoryExceeded where one layer of a token does not fit.
    """

    def __init__(self, slots: int, top_k: int, disk: Disk, half_life_tokens: float = 16.0) -> None:
        if slots < top_k:
            raise errors.MemoryExceeded(
                f"a box has room for {max(0, slots)} experts, one layer of a token needs {top_k}: "
                "give it more memory"
            )
        self._slots, self._disk = slots, disk
        self._policy = Decayed(half_life_tokens)
        self._held: dict[int, set[int]] = {}  # by layer; what is on its way counts
        self._num_held = self.num_hits = self.num_misses = 0
        self._coming: set[ExpertKey] = set()  # read ahead, and not used since
        self._expected: dict[int, frozenset[int]] = {}
        self._orders: dict[int, list[tuple[float, ExpertKey]]] = {}

    def fill(self, keys: Sequence[ExpertKey]) -> None:
        """Hold the first of these before anything is measured; no read."""
        for key in keys[: self._slots - self._num_held]:
            self._hold(key)

    def __contains__(self, key: ExpertKey) -> bool:
        return key.expert in self._held.get(key.layer, ())

    def __len__(self) -> int:
        return self._num_held

    def held_in(self, layer: int) -> Collection[int]:
        """What is in memory of the layer, or on its way."""
        return self._held.get(layer, ())

    def is_settled(self, key: ExpertKey) -> bool:
        """Whether it is in memory, and not only read ahead for a step that is to come."""
        return key in self and key not in self._coming

    def step(self, now_s: float, layer: int, experts: Sequence[int]) -> list[float]:
        """A step of `layer` needs these. Returns when each is there, in the order given."""
        keys = [ExpertKey(layer, expert) for expert in experts]
        self._withdraw(now_s, layer, experts)
        self._policy.on_step(layer, keys)
        self._orders.pop(layer, None)
        missing = [key for key in keys if key not in self]
        self._make_room(len(missing), keys)
        there_s = [self._there_s(now_s, key) for key in keys]
        for key in missing:
            self._hold(key)
        self.num_misses += len(missing)
        self.num_hits += len(keys) - len(missing)
        return there_s

    def prepare(self, now_s: float, layer: int, experts: Sequence[int]) -> None:
        """A step will soon need these: they go last, and are read ahead as far as there is room."""
        self._withdraw(now_s, layer, experts)
        self._expected[layer] = frozenset(experts)
        self.move_in(now_s, layer, experts)

    def move_in(self, now_s: float, layer: int, experts: Sequence[int]) -> None:
        """It is to have these from now on: they are read ahead as far as there is room."""
        for key in (ExpertKey(layer, expert) for expert in experts):
            if key not in self and self._make_room(1, ()):
                self._hold(key)
                self._coming.add(key)
                self._disk.read_ahead(now_s, key)

    def _there_s(self, now_s: float, key: ExpertKey) -> float:
        if self.is_settled(key):
            return now_s
        self._coming.discard(key)
        return self._disk.read(now_s, key)

    def _withdraw(self, now_s: float, layer: int, named: Collection[int]) -> None:
        """What was expected of the layer and is not named now need not be read."""
        for expert in self._expected.pop(layer, frozenset()).difference(named):
            key = ExpertKey(layer, expert)
            if key in self._coming and self._disk.withdraw(now_s, key):
                self._drop(key)

    def _make_room(self, num_wanted: int, pinned: Collection[ExpertKey]) -> bool:
        """For a step, what is expected goes only if nothing else is left; for names, never: then
        False, and nothing went.
        """
        num_going = self._num_held + num_wanted - self._slots
        if num_going <= 0:
            return True
        kept = {ExpertKey(la, e) for la, experts in self._expected.items() for e in experts}
        going = self._victims(num_going, kept.union(pinned))
        if len(going) < num_going and pinned:
            going = self._victims(num_going, pinned)
        if len(going) < num_going:
            return False
        for key in going:
            self._drop(key)
        return True

    def _victims(self, count: int, kept: Collection[ExpertKey]) -> list[ExpertKey]:
        ranked = (key for key in self._in_order() if key not in kept)
        return [key for _, key in zip(range(count), ranked, strict=False)]

    def _in_order(self) -> Iterator[ExpertKey]:
        """The first to go first; ties by key."""
        return (key for _, key in heapq.merge(*map(self._order, self._held)))

    def _order(self, layer: int) -> list[tuple[float, ExpertKey]]:
        order = self._orders.get(layer)
        if order is None:
            keys = (ExpertKey(layer, expert) for expert in self._held[layer])
            order = self._orders[layer] = sorted((self._policy.rank(key), key) for key in keys)
        return order

    def _hold(self, key: ExpertKey) -> None:
        self._held.setdefault(key.layer, set()).add(key.expert)
        self._num_held += 1
        self._orders.pop(key.layer, None)

    def _drop(self, key: ExpertKey) -> None:
        self._held[key.layer].remove(key.expert)
        self._num_held -= 1
        self._coming.discard(key)
        self._orders.pop(key.layer, None)
