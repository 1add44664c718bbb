"""Which policy every node is advised to follow: the one configured, or the one that the shadows of
the node's own stream put in charge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proto import errors
from proto.access import DecodeAccess, PrefillAccess
from proto.redis_schema import ADVISED_POLICIES, AUTO, FALLBACK_POLICY
from proto.stats import counter
from scheduler.shadow.shadows import Capacity, Report, Shadows
from scheduler.simulate.ranking import RankingPolicy

MakeMembers = Callable[[str], Mapping[str, RankingPolicy]]


@dataclass(frozen=True)
class Verdict:
    """What to tell a node.

    scores:        [L, E], or None when it needs none for that policy
    unused_scores: [L, E], of what a layer's next step does not use; None when that is not known
    as_of_ns:      `time_ns` of the newest step that is known
    """

    policy: str
    scores: NDArray[np.float32] | None = None
    unused_scores: NDArray[np.float32] | None = None
    as_of_ns: int = 0


class Advisor:
    """Keeps shadows for every node.

    names:   of the policies that may be in charge, simplest first
    members: makes them for the node so named
    policy:  who is in charge of every node; AUTO, the shadows decide

    restarts: a node's budget changed, and its shadows began anew
    """

    restarts: int = counter(
        "flashmoe_scheduler_shadow_restarts", "shadow restarts", key="shadow_restarts"
    )

    def __init__(
        self,
        names: Sequence[str],
        members: MakeMembers,
        half_life_steps: float,
        policy: str = AUTO,
    ) -> None:
        """Raises ConfigInvalid when the policy is one that scores, and nothing was learned for
        it.
        """
        if policy in ADVISED_POLICIES and policy not in names:
            raise errors.ConfigInvalid(
                f"policy = {policy!r}, but nothing was calibrated for this model: run "
                "`flashmoe calibrate` on the store, or choose another policy"
            )
        self._members = members
        self._half_life_steps = half_life_steps
        self._pinned = None if policy == AUTO else policy
        self._nodes: dict[str, Shadows] = {}

    def check(self, event: DecodeAccess | PrefillAccess) -> None:
        """Raises MessageInvalid for a capacity that cannot hold the experts of a token."""
        if isinstance(event, DecodeAccess):
            Capacity.of(event)

    def observe(self, event: DecodeAccess) -> None:
        """One more step of a node; under another capacity than before, its shadows begin anew."""
        capacity = Capacity.of(event)
        shadows = self._nodes.get(event.node)
        if shadows is None or shadows.capacity != capacity:
            self.restarts += shadows is not None
            shadows = self._nodes[event.node] = self._begin(event.node, capacity)
        shadows.step(event)

    def keep(self, nodes: Collection[str]) -> None:
        """Forget all others."""
        for gone in self._nodes.keys() - nodes:
            del self._nodes[gone]

    def advise(self, node: str) -> Verdict:
        """Before any evidence of a step, the node's own fallback."""
        shadows = self._nodes.get(node)
        if shadows is None:
            return Verdict(FALLBACK_POLICY)
        return Verdict(
            shadows.in_charge, shadows.scores(), shadows.unused_scores(), shadows.as_of_ns
        )

    def reports(self) -> tuple[Report, ...]:
        """Of every node that sent a step."""
        return tuple(shadows.report(node) for node, shadows in self._nodes.items())

    def _begin(self, node: str, capacity: Capacity) -> Shadows:
        members = self._members(node)
        advised = frozenset(ADVISED_POLICIES)
        return Shadows(capacity, members, advised, self._half_life_steps, self._pinned)
