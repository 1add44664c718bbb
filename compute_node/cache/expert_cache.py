"""Borrowed experts under a capacity: what is resident, and what is on its way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from compute_node.cache.asked import (
    NONE_SMALL,
    Asked,
    Elsewhere,
    Meanwhile,
    Needs,
    Nowhere,
    Waiter,
    exact,
    never,
    sleep,
)
from compute_node.cache.capacity import Capacity
from compute_node.cache.counters import LayerCounters
from compute_node.cache.lender import Lender
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.cache.residents import Residents
from compute_node.cache.room import Room
from compute_node.cache.upgrades import Upgrades
from compute_node.cache.waits import Waits
from compute_node.store.memory import Borrowed
from compute_node.store.session import SessionLost
from proto import errors
from proto.expert import EXACT_VARIANT, ExpertKey, RecordKey
from proto.stats import gauge

logger = logging.getLogger(__name__)

_WARM_BATCH = 1024


@dataclass
class ExpertCache:
    """The experts a node holds. One thread.

    waits: how long it waited
    room:  what goes when room is needed
    upgrades: what is read while nobody waits
    elsewhere: experts that other boxes compute: they are not read ahead
    """

    lender: Lender
    capacity: Capacity
    chooser: PolicyChooser
    counters: dict[int, LayerCounters] = field(init=False)
    waits: Waits = field(init=False)
    room: Room = field(init=False)
    upgrades: Upgrades = field(init=False)
    elsewhere: Elsewhere = field(default_factory=Nowhere)
    _resident: Residents = field(init=False)
    _asked: list[Asked] = field(default_factory=list)  # not all of it has come

    def __post_init__(self) -> None:
        layers = self.capacity.moe_layers
        self.counters = {layer: LayerCounters() for layer in layers}
        self.waits = Waits(self.counters)
        self._resident = Residents(layers, self.capacity.num_parts)
        self.room = Room(self.capacity, self._resident, self.chooser)
        self.upgrades = Upgrades(self.room, self._resident)

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether its exact record is here."""
        held = self._resident.get(key)
        return held is not None and held.is_exact

    def holds(self, key: ExpertKey) -> bool:
        """Whether a record of it is here, exact or small."""
        return key in self._resident

    @property
    @gauge("flashmoe_node_resident_experts", "Experts in the cache")
    def resident(self) -> int:
        return len(self._resident)

    def step(
        self,
        layer: int,
        experts: Sequence[int],
        check: Callable[[], None] = never,
        disproved: Callable[[], Sequence[ExpertKey]] = tuple,
        guess: Callable[[], Sequence[ExpertKey]] = tuple,
        meanwhile: Meanwhile = sleep,
        small: Mapping[int, str] = NONE_SMALL,
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """One step of `layer` needs these distinct experts.

        check:     called now and while the step waits; raises to give the step up
        disproved: takes the guesses that need not be read any more; called for each message
        guess:     what later layers may need; called once the misses are on their way, after
                   what is resident was computed with, and again if the session breaks after that
        meanwhile: uses the time of each wait
        small:     by expert, the variant that will do where nothing is resident: a resident record
                   does, of whichever variant; others need the exact one

        Returns which of them are hits, and waves that together hold each expert once; a wave is
        valid until the next is asked for.
        What is resident comes first, while the rest is read; then each expert as it comes.
        Nothing is read twice even when the step needs more than fits. A step that is given up costs
        nothing: what it asked for comes, and is kept by the next.
        Raises StoreUnavailable and what `check` raises; iterating also ExpertDamaged, StaleLease.
        """
        check()
        self.let_go_if_lost()
        used = [ExpertKey(layer, expert) for expert in experts]
        self.collect(check, [key for key in used if key.expert not in small])
        self.room.reach(layer, used)
        self.chooser.on_step(layer, used)
        self._resident.on_step(layer)
        needs = Needs(layer, used, check, disproved, guess, meanwhile, small)
        hits = [key for key in used if self._serves(needs, key)]
        counters = self.counters[layer]
        counters.hits += len(hits)
        counters.misses += len(used) - len(hits)
        if small:
            in_few_bits = [key for key in hits if key not in self]
            with self._noticing_loss():
                self.upgrades.begin(self.lender, in_few_bits, len(used) - len(hits))
        return {key.expert for key in hits}, self._waves(needs, hits)

    def held(self, key: ExpertKey) -> Borrowed:
        """A resident record of an expert, valid until something is asked of the cache."""
        return self._resident[key]

    def read_ahead(
        self,
        layer: int,
        keys: Sequence[ExpertKey],
        wrong: Sequence[ExpertKey],
        num_guesses: int,
    ) -> Sequence[ExpertKey]:
        """Have the store read guesses about `layer`, the likeliest first, as far as there is room
        for them; they take it from what the policy values least.

        wrong:       guesses that are withdrawn
        num_guesses: that are not settled, these included

        Returns those that were asked for: none where they would have to travel, as a store reads
        ahead into its own memory alone. Raises SessionLost.
        """
        if self.lender.lends_copies:
            return ()
        going, num_left_out = self.room.for_guesses(layer, num_guesses) if keys else ([], 0)
        keys = keys[: max(0, len(keys) - num_left_out)]
        given_up = self.give_up(going)
        if keys or wrong or going:
            self.lender.borrow(
                given_up, [], never, prefetches=exact(keys), withdrawals=exact(wrong)
            )
        return keys

    def open(self, check: Callable[[], None] = never) -> None:
        """Open a session with the store; start warm from what it has in memory, no byte is read.
        Where that would have to travel, start empty: it is what other nodes use.

        Raises StoreUnavailable, SlotsExhausted, VersionMismatch, and what `check` raises.
        """
        self._forget()
        self.lender.open(check)
        if self.lender.lends_copies:
            return
        in_memory = [one.expert for one in self.lender.resident() if one.variant == EXACT_VARIANT]
        chosen = exact(self.room.of_empty(sorted(in_memory)))
        for start in range(0, len(chosen), _WARM_BATCH):
            self._insert(self.lender.exchange([], chosen[start : start + _WARM_BATCH], check))

    def let_go_if_lost(self) -> None:
        """If the session broke, forget what it lent, so that the store may refill it."""
        if (self._resident or self._asked) and not self.lender.is_open:
            self._let_go()

    def _waves(self, needs: Needs, hits: list[ExpertKey]) -> Iterator[list[Borrowed]]:
        """A session that breaks is opened again, and what was not handed out yet is asked for
        there.
        """
        left = {key.expert: key for key in (*hits, *needs.used)}
        was_starved = False
        try:
            while left:
                try:
                    for keys in self._served(needs, list(left.values())):
                        yield from self._hand_out(keys)
                        for key in keys:
                            del left[key.expert]
                except SessionLost as error:
                    logger.warning("session lost, opening again", extra={"reason": str(error)})
                    self._let_go()
                except errors.SlotsExhausted as error:  # other nodes' small records in each slot
                    if was_starved:
                        raise
                    logger.warning("no room, lending anew", extra={"reason": str(error)})
                    was_starved = True
                    self._let_go()
        except BaseException:
            self.let_go_if_lost()
            raise

    def _served(self, needs: Needs, keys: list[ExpertKey]) -> Iterator[list[ExpertKey]]:
        """Parts of `keys` as they are there: the misses are asked for before what is resident is
        handed out, so that one loads while the other is computed with.
        """
        layer = needs.layer
        if not self.lender.is_open:
            with self.waits.waiting(layer):
                self.open(needs.check)
        held = [key for key in keys if self._serves(needs, key)]
        misses = [key for key in keys if not self._serves(needs, key)]
        capacity = self.room.slots[layer]
        if len(keys) <= capacity:
            asked = self._ask(needs, misses, keys)
            self._speculate(needs)
            if held:
                yield held
                self._speculate(needs)
            yield from self._arrive(layer, asked, needs.check, needs.meanwhile)
            return
        if held:
            yield held
        # Two parts fit: one loads while the other is computed with, and the policy keeps the better
        # half of what it has.
        size = max(1, capacity // 4)
        parts = [misses[start : start + size] for start in range(0, len(misses), size)]
        yield from self._pipelined(needs, parts, ahead=capacity >= 2 * size)

    def _pipelined(
        self, needs: Needs, parts: list[list[ExpertKey]], ahead: bool
    ) -> Iterator[list[ExpertKey]]:
        """ahead: each part is asked for before the one before it has come."""
        asked = self._ask(needs, parts[0], parts[0])
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            latest = asked
            if ahead:
                latest = self._ask(needs, following, [*part, *following])
            yield from self._arrive(needs.layer, asked, needs.check)
            asked = latest if ahead else self._ask(needs, following, following)

    def _hand_out(self, keys: list[ExpertKey]) -> Iterator[list[Borrowed]]:
        wave = [self._resident[key] for key in keys]
        self.check_current(wave)
        yield wave
        self.check_current(wave)

    def check_current(self, wave: list[Borrowed]) -> None:
        for borrowed in wave:
            if not self.lender.is_current(borrowed):
                self._let_go()
                raise errors.StaleLease(f"{borrowed.key} was refilled while it was used: retry")

    def _ask(
        self, needs: Needs, misses: list[ExpertKey], pinned: Sequence[ExpertKey]
    ) -> Asked | None:
        """One message: what goes, what is wanted, and which guesses were wrong. None: nothing is
        wanted.
        """
        disproved, waiter = needs.disproved(), Waiter(needs.check)
        if not misses and not disproved:
            return None
        records = [RecordKey(key, needs.small.get(key.expert, EXACT_VARIANT)) for key in misses]
        going = self.give_up(self.room.for_misses(needs.layer, records, pinned))
        self.room.under_way.update(records)
        arrivals = self.lender.borrow(going, records, waiter, withdrawals=exact(disproved))
        if not misses:
            return None
        asked = Asked(records, arrivals, waiter)
        self._asked.append(asked)
        return asked

    def _arrive(
        self,
        layer: int,
        asked: Asked | None,
        check: Callable[[], None],
        meanwhile: Meanwhile = sleep,
    ) -> Iterator[list[ExpertKey]]:
        if asked is None:
            return
        asked.waiter.check = check
        try:
            while arrivals := self._next(layer, asked, meanwhile):
                self._insert(arrivals)
                self.counters[layer].bytes_read += sum(a.bytes_read for a in arrivals)
                if len(asked.misses) == 1 and arrivals[0].bytes_read:
                    self.waits.time_read(arrivals[0])
                yield [borrowed.key for borrowed in arrivals]
        except errors.ExpertDamaged:
            self._settle(asked)
            raise
        self._settle(asked)

    def _settle(self, asked: Asked) -> None:
        """Nothing of it is on its way any more."""
        self.room.under_way.difference_update(asked.misses)
        self._asked = [other for other in self._asked if other is not asked]

    def collect(self, check: Callable[[], None], needed: Sequence[ExpertKey]) -> None:
        """What a step that was given up had asked for, and what was read while nobody waited.

        needed: whose exact records are used next
        """
        while self._asked:
            asked = self._asked[0]
            try:
                with self._noticing_loss():
                    for _ in self._arrive(asked.misses[0].expert.layer, asked, check):
                        pass
            except errors.ExpertDamaged as error:  # a step that needs it gets the error again
                logger.info("damaged expert given up", extra={"reason": str(error)})
        with self._noticing_loss():
            self._insert(self.upgrades.settle(self.lender, needed))

    @contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        """Of the session, by what can do without it."""
        try:
            yield
        except SessionLost as error:
            logger.warning("session lost", extra={"reason": str(error)})
            self._let_go()

    def _next(self, layer: int, asked: Asked, meanwhile: Meanwhile) -> list[Borrowed]:
        """Empty when all has come."""
        with self.waits.waiting(layer) as came:
            if not asked.arrivals.is_ready():
                meanwhile(asked.arrivals.is_ready)
            came += next(asked.arrivals, ())
        return came

    def _speculate(self, needs: Needs) -> None:
        wanted = exact(key for key in needs.guess() if key not in self)
        if wanted:
            withdrawals = exact(needs.disproved())
            self.lender.borrow([], [], needs.check, prefetches=wanted, withdrawals=withdrawals)

    def _serves(self, needs: Needs, key: ExpertKey) -> bool:
        held = self._resident.get(key)
        return held is not None and (held.is_exact or key.expert in needs.small)

    def give_up(self, keys: Sequence[ExpertKey]) -> list[RecordKey]:
        """What to release for it."""
        records = [self._resident[key].record for key in keys]
        self._resident.evict(keys)
        return records

    def _insert(self, arrivals: list[Borrowed]) -> None:
        for borrowed in arrivals:
            self.room.under_way.discard(borrowed.record)
            self._resident.insert(borrowed)

    def _let_go(self) -> None:
        """Of the session, and of everything it lent."""
        self._forget()
        self.lender.abort()

    def _forget(self) -> None:
        self.room.under_way.clear()
        self.upgrades.forget()
        self._asked.clear()
        self._resident.clear()
