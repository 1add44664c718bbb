"""Borrowed experts under a budget: what is resident, what goes when room is needed, what a miss
cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compute_node.cache.charge import Charge
from compute_node.cache.residents import Residents
from compute_node.expert_memory import Borrowed
from compute_node.store_session import Arrival, SessionLost
from proto import errors
from proto.expert import ExpertKey

logger = logging.getLogger(__name__)


class Lender(Protocol):
    """What the cache needs of a store client."""

    @property
    def is_open(self) -> bool: ...

    def open(self, check: Callable[[], None] = ...) -> None: ...

    def exchange(
        self,
        releases: Sequence[ExpertKey],
        acquires: Sequence[ExpertKey],
        check: Callable[[], None] = ...,
    ) -> list[Arrival]: ...

    def resident(self) -> list[ExpertKey]: ...

    def is_current(self, borrowed: Borrowed) -> bool: ...

    def abort(self) -> None: ...


@dataclass(frozen=True)
class Budget:
    """How many experts may be resident: so many a layer, or so many in one pool for all layers."""

    slots: int
    moe_layers: tuple[int, ...]
    top_k: int
    pooled: bool

    def __post_init__(self) -> None:
        """Raises MemoryExceeded naming the smallest budget that works."""
        smallest = self.top_k if self.pooled else self.top_k * len(self.moe_layers)
        if self.slots < smallest:
            scope = "one pool" if self.pooled else f"{len(self.moe_layers)} layers"
            raise errors.MemoryExceeded(
                f"{self.slots} slots cannot hold the {self.top_k} experts a token uses in {scope}: "
                f"give at least {smallest} slots"
            )

    def capacity(self, layer: int) -> int:
        """Slots that experts of `layer` may fill."""
        if self.pooled:
            return self.slots
        share, rest = divmod(self.slots, len(self.moe_layers))
        return share + (self.moe_layers.index(layer) < rest)


@dataclass
class LayerCounters:
    """Of one layer, since start. A miss that another node's copy answers reads 0 bytes."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0


@dataclass
class ExpertCache:
    """The experts a node holds. One thread.

    check: called between layers and while waiting; raises to abandon the request at hand
    """

    lender: Lender
    budget: Budget
    charge: Charge
    check: Callable[[], None] = lambda: None
    counters: dict[int, LayerCounters] = field(default_factory=dict)
    _resident: Residents = field(init=False)

    def __post_init__(self) -> None:
        self.counters = {layer: LayerCounters() for layer in self.budget.moe_layers}
        self._resident = Residents(self.budget.moe_layers)
        self._capacity = {layer: self.budget.capacity(layer) for layer in self.budget.moe_layers}

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._resident

    def step(self, layer: int, experts: Sequence[int]) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """One step of `layer` needs these distinct experts.

        Returns which of them are hits, and waves that together hold each expert once; a wave is
        valid until the next is asked for.
        What is resident comes first, so nothing is read twice even when the step needs more than
        fits.
        Iterating raises StoreUnavailable, ExpertDamaged, StaleLease, and what `check` raises.
        """
        self.check()
        self.let_go_if_lost()
        used = [ExpertKey(layer, expert) for expert in experts]
        self.charge.on_step(layer, used)
        self._resident.on_step(layer)
        hits = [key for key in used if key in self._resident]
        counters = self.counters[layer]
        counters.hits += len(hits)
        counters.misses += len(used) - len(hits)
        return {key.expert for key in hits}, self._waves(layer, used, hits)

    def open(self) -> None:
        """Open a session with the store; start warm from what it has in memory, no byte is read.

        Raises StoreUnavailable, SlotsExhausted, VersionMismatch, and what `check` raises.
        """
        self._resident.clear()
        self.lender.open(self.check)
        room = dict(self._capacity)
        chosen: list[ExpertKey] = []
        for key in sorted(self.lender.resident()):
            if room[key.layer] and len(chosen) < self.budget.slots:
                room[key.layer] -= 1
                chosen.append(key)
        if chosen:
            self._insert(self.lender.exchange([], chosen, self.check))

    def let_go_if_lost(self) -> None:
        """If the session broke, forget what it lent, so that the store may refill it."""
        if self._resident and not self.lender.is_open:
            self._resident.clear()
            self.lender.abort()

    def _waves(
        self, layer: int, used: list[ExpertKey], hits: list[ExpertKey]
    ) -> Iterator[list[Borrowed]]:
        capacity = self._capacity[layer]
        if len(used) <= capacity:
            yield from self._wave(used)
            return
        if hits:
            yield from self._wave(hits)
        resident = set(hits)
        misses = [key for key in used if key not in resident]
        # Half the room a wave, so that the policy keeps the better half of what it has.
        size = max(1, capacity // 2)
        for start in range(0, len(misses), size):
            yield from self._wave(misses[start : start + size])

    def _wave(self, keys: list[ExpertKey]) -> Iterator[list[Borrowed]]:
        self._ensure(keys)
        wave = [self._resident[key] for key in keys]
        self._check_current(wave)
        yield wave
        self._check_current(wave)

    def _check_current(self, wave: list[Borrowed]) -> None:
        for borrowed in wave:
            if not self.lender.is_current(borrowed):
                self.lender.abort()
                self._resident.clear()
                raise errors.StaleLease(f"{borrowed.key} was refilled while it was used: retry")

    def _ensure(self, keys: list[ExpertKey]) -> None:
        """Make every one of `keys` resident; a session that breaks is opened again, with what
        was held.
        """
        start_s = time.perf_counter()
        try:
            while any(key not in self._resident for key in keys):
                try:
                    self._fetch(keys)
                except SessionLost as error:
                    logger.warning("session lost, opening again", extra={"reason": str(error)})
                    self._resident.clear()
        except BaseException:
            self.let_go_if_lost()
            raise
        finally:
            self.counters[keys[0].layer].stall_s += time.perf_counter() - start_s

    def _fetch(self, keys: list[ExpertKey]) -> None:
        """One exchange, in a session opened anew if need be."""
        if not self.lender.is_open:
            self.open()
        missing = [key for key in keys if key not in self._resident]
        if missing:
            arrivals = self.lender.exchange(self._make_room(keys, missing), missing, self.check)
            self._insert(arrivals)
            self.counters[keys[0].layer].bytes_read += sum(a.bytes_read for a in arrivals)

    def _make_room(self, keys: list[ExpertKey], missing: list[ExpertKey]) -> list[ExpertKey]:
        """Evict until `missing` fits; never what this wave needs."""
        layer, resident = keys[0].layer, self._resident
        num_rivals = len(resident) if self.budget.pooled else resident.count(layer)
        excess = num_rivals + len(missing) - self._capacity[layer]
        if excess <= 0:
            return []
        policy = self.charge.choose()
        going = resident.victims(policy, excess, keys, None if self.budget.pooled else layer)
        for key in going:
            resident.evict(key)
        return going

    def _insert(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            self._resident.insert(arrival.borrowed)
