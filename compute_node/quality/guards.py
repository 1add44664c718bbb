"""The guards of a node, one for each budget that somebody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from compute_node.moe.route import RoutePolicy
from compute_node.moe.routes.rules import policy_of
from compute_node.quality.guard import Guard
from compute_node.quality.turns import Rung
from proto import errors
from proto.quality import Budget, QualityCard

_MOST = 32  # each keeps what it found for as long as the node runs


class Guards:
    """Asked by who translates requests, and by who shows counters. A guard itself is of the thread
    that computes.
    """

    def __init__(
        self, card: QualityCard | None, check_route: Callable[[RoutePolicy], None]
    ) -> None:
        """card:     None: nothing was measured of this store
        check_route: raises InvalidRequest for a route that this store cannot serve
        """
        self._card, self._check_route = card, check_route
        self._guards: dict[str, Guard] = {}

    def __iter__(self) -> Iterator[Guard]:
        return iter([*self._guards.values()])

    def of(self, budget: Budget) -> Guard:
        """Raises InvalidRequest without a card, and for more budgets than a node keeps."""
        guard = self._guards.get(str(budget))
        if guard is None:
            guard = self._guards[str(budget)] = self._new(budget)
        return guard

    def _new(self, budget: Budget) -> Guard:
        if self._card is None:
            raise errors.InvalidRequest(
                f"quality {budget} cannot be kept, for nothing was measured of this store: run "
                "`flashmoe tune` on it and start again, or ask for quality exact"
            )
        if len(self._guards) >= _MOST:
            raise errors.InvalidRequest(
                f"quality {budget} is one budget more than the {_MOST} that a node keeps: use one "
                f"of {', '.join(self._guards)}"
            )
        rungs = [self._rung(setting.route) for setting in self._card.ladder(budget)]
        return Guard(budget, rungs)

    def _rung(self, route: str) -> Rung:
        policy = policy_of(route)
        self._check_route(policy)
        return Rung(route, policy)
