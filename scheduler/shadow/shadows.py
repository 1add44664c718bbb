"""What every policy would have hit on one node's stream under the node's own capacity, what MIN
would have, and who should be in charge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proto import errors
from proto.access import DecodeAccess
from proto.redis_schema import POOL
from proto.stats import Labelled, counter, fact, gauge, labelled
from scheduler.policy.hedged import PINNED, Hedge, Reason, hit_ratio
from scheduler.shadow.optimum import Optimum
from scheduler.simulate.ranking import AdvisingPolicy, RankingPolicy
from scheduler.simulate.replay import RankedCache
from scheduler.simulate.slots import LayerSlots, PoolSlots, Slots

ADVISED_LAG_STEPS = 1  # live, scores are of the step before


@dataclass(frozen=True)
class Capacity:
    """Of one node, for the experts of `top_k` a layer and token. slots: of all layers together."""

    shape: tuple[int, int]
    top_k: int
    slots: int
    scope: str

    @classmethod
    def of(cls, event: DecodeAccess) -> Capacity:
        """Raises MessageInvalid for one that cannot hold the experts of a token."""
        num_layers, top_k = event.topk_ids.shape
        needed = top_k if event.scope == POOL else top_k * num_layers
        if event.slots < needed:
            raise errors.MessageInvalid(f"evidence of {event.slots} slots, a token needs {needed}")
        slots = min(event.slots, num_layers * event.num_experts)
        return cls((num_layers, event.num_experts), top_k, slots, event.scope)

    def shares(self) -> NDArray[np.intp]:
        """Slots of the one pool, or of each layer: the first ones share the remainder, as in the
        node.
        """
        if self.scope == POOL:
            return np.array([self.slots])
        share, rest = divmod(self.slots, self.shape[0])
        return share + (np.arange(self.shape[0]) < rest)

    def empty_slots(self) -> Slots:
        if self.scope == POOL:
            return PoolSlots(self.shape, self.slots)
        return LayerSlots(self.shape, self.shares())


@dataclass(frozen=True)
class Score:
    """A policy's hit ratio, over all steps and over the last ones (decayed).

    windowed_regret: what MIN hit more over the last ones
    """

    hit_ratio: float = gauge(
        "flashmoe_scheduler_shadow_hit_ratio",
        "what the policy would have hit under the node's budget, since that changed",
    )
    windowed_hit_ratio: float = gauge(
        "flashmoe_scheduler_shadow_windowed_hit_ratio", "the same, decayed"
    )
    windowed_regret: float = gauge(
        "flashmoe_scheduler_shadow_windowed_regret", "what MIN would have hit more, decayed"
    )


@dataclass(frozen=True)
class InCharge:
    """Its labels say which policy."""

    is_in_charge: int = gauge("flashmoe_scheduler_in_charge", "1 for the policy in charge", start=1)


@dataclass(frozen=True)
class Report:
    """Of one node, since its capacity last changed. policies: by name, `min` among them.

    actual:        of the node's own cache, as it reported
    switches:      how often another policy was put in charge
    """

    node: str
    reason: Reason
    policies: Mapping[str, Score]
    actual: Score
    slots: int = fact("of its budget")
    scope: str = fact("of its budget: layer or pool")
    steps: int = fact("followed under that budget")
    in_charge: str = fact("the policy that the node is advised to follow")
    switches: int = counter("flashmoe_scheduler_switches", "changes of the policy in charge")

    @property
    @fact("why that policy is in charge")
    def why(self) -> str:
        return str(self.reason)

    def sources(self) -> Iterator[Labelled]:
        """By node and policy: `actual` is the node's own cache, `min` the optimum."""
        yield labelled(self, node=self.node)
        for policy, score in {**self.policies, "actual": self.actual}.items():
            yield labelled(score, node=self.node, policy=policy)
        yield labelled(InCharge(), node=self.node, policy=self.in_charge)


class Tally:
    """Hit ratio of one policy. half_life_steps: in this many, a step loses half its weight."""

    def __init__(self, half_life_steps: float) -> None:
        self._newest = 1 - 0.5 ** (1 / half_life_steps)
        self._num_steps = 0
        self.hit_ratio = 0.0
        self.windowed_hit_ratio = 0.0

    def count(self, ratio: float) -> None:
        """Of one more step. Until the window has filled, both are the plain mean."""
        self._num_steps += 1
        self.hit_ratio += (ratio - self.hit_ratio) / self._num_steps
        newest = max(self._newest, 1 / self._num_steps)
        self.windowed_hit_ratio += newest * (ratio - self.windowed_hit_ratio)


class Shadows:
    """The members on one node's stream.

    members: by name, simplest first; their state begins with these shadows
    advised: names of those whose ranks come to the node from here, one step late
    pinned:  who is in charge whatever the shadows say, or None

    as_of_ns: `time_ns` of the newest step
    """

    def __init__(
        self,
        capacity: Capacity,
        members: Mapping[str, RankingPolicy],
        advised: frozenset[str],
        half_life_steps: float,
        pinned: str | None = None,
    ) -> None:
        self.capacity = capacity
        self._members = {
            name: RankedCache(
                policy, capacity.empty_slots(), ADVISED_LAG_STEPS if name in advised else 0
            )
            for name, policy in members.items()
        }
        self._advised = advised
        self._optimum = Optimum(capacity.shape, capacity.top_k, capacity.shares().tolist())
        self._hedge = Hedge(list(members))
        self._pinned = pinned
        self._tallies = {name: Tally(half_life_steps) for name in (*members, "min")}
        self._actual = Tally(half_life_steps)
        self._num_steps = 0
        self.as_of_ns = 0

    @property
    def in_charge(self) -> str:
        return self._pinned or self._hedge.in_charge

    def step(self, event: DecodeAccess) -> None:
        """One more decode step under this capacity."""
        self._num_steps += 1
        self.as_of_ns = event.time_ns
        ratios = {name: hit_ratio(member.step(event)) for name, member in self._members.items()}
        self._hedge.observe(ratios)
        ratios["min"] = hit_ratio(self._optimum.step(event.topk_ids))
        for name, ratio in ratios.items():
            self._tallies[name].count(ratio)
        self._actual.count(hit_ratio(event.hits))

    def scores(self) -> NDArray[np.float32] | None:
        """[L, E] in [0, 1], of the policy in charge; None when that is one of the node's own."""
        if self.in_charge not in self._advised:
            return None
        return self._members[self.in_charge].ranks.astype(np.float32)

    def unused_scores(self) -> NDArray[np.float32] | None:
        """[L, E] likewise, of what a layer's next step does not use; None when not known."""
        if self.in_charge not in self._advised:
            return None
        policy = self._members[self.in_charge].policy
        if not isinstance(policy, AdvisingPolicy):
            return None
        return policy.unused_ranks().astype(np.float32)

    def report(self, node: str) -> Report:
        hedge = self._hedge
        return Report(
            node=node,
            slots=self.capacity.slots,
            scope=self.capacity.scope,
            steps=self._num_steps,
            in_charge=self.in_charge,
            reason=Reason(PINNED) if self._pinned else hedge.reason,
            switches=0 if self._pinned else hedge.num_switches,
            policies={name: self._score(tally) for name, tally in self._tallies.items()},
            actual=self._score(self._actual),
        )

    def _score(self, tally: Tally) -> Score:
        best = self._tallies["min"].windowed_hit_ratio
        return Score(tally.hit_ratio, tally.windowed_hit_ratio, best - tally.windowed_hit_ratio)
