"""Exact records of experts that are used in fewer bits, read into free room while nobody waits."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from compute_node.cache.asked import Asked, Waiter, never
from compute_node.cache.lender import Lender
from compute_node.cache.residents import Residents
from compute_node.cache.room import Room
from compute_node.store.memory import Borrowed
from proto import errors
from proto.expert import ExpertKey, RecordKey
from proto.redis_schema import FALLBACK_POLICY
from proto.stats import counter

logger = logging.getLogger(__name__)

_QUIET_TOKENS = 4


@dataclass(eq=False)
class Upgrades:
    """Of one cache. One thread. One record at a time, once as many tokens as `_QUIET_TOKENS` missed
    nothing: what a token waits for is never behind more than one of these. Nothing goes for them.
    """

    room: Room
    residents: Residents
    num_done: int = counter(
        "flashmoe_node_upgrades", "Small records replaced by exact ones", key="upgrades"
    )
    _asked: Asked | None = None
    _num_quiet: int = 0  # layers in a row that missed nothing
    _damaged: set[ExpertKey] = field(default_factory=set)

    def begin(self, lender: Lender, small: Sequence[ExpertKey], num_misses: int) -> None:
        """A layer is computed with these small records, and misses as many experts as this. Raises
        SessionLost.
        """
        self._num_quiet = 0 if num_misses else self._num_quiet + 1
        wanted = [key for key in small if key not in self._damaged]
        is_quiet = self._num_quiet > _QUIET_TOKENS * len(self.room.capacity.moe_layers)
        if self._asked or not wanted or not is_quiet or not self.room.has_free_slot(small[0].layer):
            return
        often = self.room.chooser.local[FALLBACK_POLICY].rank
        record = RecordKey(max(wanted, key=often))
        self.room.under_way.add(record)
        waiter = Waiter(never)
        self._asked = Asked([record], lender.borrow([], [record], waiter), waiter)

    def settle(self, lender: Lender, needed: Container[ExpertKey]) -> list[Borrowed]:
        """What came, which may be inserted: what was held of it is given back. Waits for a record
        that is needed next. Raises SessionLost.
        """
        asked = self._asked
        if asked is None:
            return []
        [record] = asked.misses
        if not asked.arrivals.is_ready() and record.expert not in needed:
            return []
        self._asked = None
        self.room.under_way.discard(record)
        try:
            came = [borrowed for wave in asked.arrivals for borrowed in wave]
        except errors.ExpertDamaged as error:  # its small record does
            self._damaged.add(record.expert)
            logger.warning("damaged expert stays in fewer bits", extra={"reason": str(error)})
            return []
        held = self.residents.get(record.expert)
        if held is not None:
            self.residents.evict([record.expert])
            lender.borrow([held.record], [], never)
        self.num_done += len(came)
        return came

    def forget(self) -> None:
        """The session ended."""
        self._asked = None
        self._num_quiet = 0
