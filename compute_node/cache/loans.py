"""Exact records for a pass beside the true one: read, computed with, and given back. So the true
pass finds the residents that it would have found, but for the few that made room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.store.memory import Borrowed
from compute_node.store.session import SessionLost
from proto import errors
from proto.expert import ExpertKey, RecordKey
from proto.stats import counter

_AT_ONCE = 2  # fewer would wait for each read, more would drive more residents out


@dataclass(eq=False)
class Loans:
    """Of one cache. One thread. Policies hear nothing of them.

    bytes_read: for them, which the cache does not count
    """

    cache: ExpertCache
    bytes_read: int = counter(
        "flashmoe_node_exact_pass_bytes", "Read to check lossy tokens", key="exact_pass_bytes"
    )
    _asked: list[RecordKey] = field(default_factory=list)
    _lent: list[RecordKey] = field(default_factory=list)  # what came of it

    def step(
        self, layer: int, experts: Sequence[int], check: Callable[[], None] = never
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """As `ExpertCache.step`: which are resident as exact records, and waves.

        Raises SessionLost (the true pass opens the next session), ExpertDamaged, SlotsExhausted,
        StoreUnavailable, StaleLease, and what `check` raises, after which no session is left.
        """
        check()
        self.cache.let_go_if_lost()
        used = [ExpertKey(layer, expert) for expert in experts]
        self.cache.collect(check, used)
        hits = [key for key in used if key in self.cache]
        return {key.expert for key in hits}, self._waves(layer, used, hits, check)

    def end(self) -> None:
        """The pass is through, or given up: what it still has goes back."""
        returned = self._returned()
        if returned and self.cache.lender.is_open:
            try:
                self.cache.lender.borrow(returned, [], never)
            except SessionLost:
                self.cache.let_go_if_lost()

    def _waves(
        self,
        layer: int,
        used: Sequence[ExpertKey],
        hits: Sequence[ExpertKey],
        check: Callable[[], None],
    ) -> Iterator[list[Borrowed]]:
        if hits:
            yield from self._current([self.cache.held(key) for key in hits])
        misses = [key for key in used if key not in hits]
        for start in range(0, len(misses), _AT_ONCE):
            yield from self._borrowed(layer, misses[start : start + _AT_ONCE], check)

    def _borrowed(
        self, layer: int, keys: Sequence[ExpertKey], check: Callable[[], None]
    ) -> Iterator[list[Borrowed]]:
        """In place of what was lent before."""
        cache, records = self.cache, [RecordKey(key) for key in keys]
        returned = self._returned()
        going = cache.give_up(cache.room.for_loans(layer, len(records)))
        self._asked = records
        cache.room.under_way.update(records)
        try:
            for wave in cache.lender.borrow([*returned, *going], records, check):
                self._lent += [borrowed.record for borrowed in wave]
                self.bytes_read += sum(borrowed.bytes_read for borrowed in wave)
                yield from self._current(wave)
        except errors.ExpertDamaged:
            raise
        except BaseException:  # what is on its way would come to nobody
            cache.lender.abort()
            cache.let_go_if_lost()
            raise

    def _returned(self) -> list[RecordKey]:
        """What was lent, which goes back with the next message."""
        self.cache.room.under_way.difference_update(self._asked)
        returned, self._asked, self._lent = self._lent, [], []
        return returned

    def _current(self, wave: list[Borrowed]) -> Iterator[list[Borrowed]]:
        self.cache.check_current(wave)
        yield wave
        self.cache.check_current(wave)
