"""The policies that may be in charge of a node, and what they are made of."""

from __future__ import annotations

from proto.redis_schema import DecodeAccess
from scheduler.config import SchedulerConfig
from scheduler.daemon.scorer import Scorer
from scheduler.learn.forecaster import Forecaster
from scheduler.policy.decayed import Decayed
from scheduler.policy.learned import Learned
from scheduler.policy.lfru import Lfru
from scheduler.policy.lru import Lru
from scheduler.simulate.ranking import RankingPolicy, Ranks


class Members:
    """Makes them for one node after another. The node's fallback is the first.

    forecaster: for `learned`; None, nothing was calibrated
    """

    def __init__(
        self, config: SchedulerConfig, scorer: Scorer, forecaster: Forecaster | None = None
    ) -> None:
        self._shape = (config.num_layers, config.num_experts)
        self._half_life_tokens = config.decayed_half_life_tokens
        self._scorer = scorer
        self._forecaster = forecaster

    @property
    def names(self) -> tuple[str, ...]:
        """Simplest first."""
        learned = () if self._forecaster is None else ("learned",)
        return ("decayed", "lru", "lfru", "river", *learned)

    def of(self, node: str) -> dict[str, RankingPolicy]:
        """By name, simplest first, for a node that the scorer has heard."""
        members: dict[str, RankingPolicy] = {
            "decayed": Decayed(self._shape, self._half_life_tokens),
            "lru": Lru(self._shape),
            "lfru": Lfru(self._shape),
            "river": ScoredNode(self._scorer, node),
        }
        if self._forecaster is not None:
            members["learned"] = Learned(self._forecaster, self._scorer.features(node))
        return members


class ScoredNode:
    """The scorer's learner for one node; the scorer tells it of the evidence by itself."""

    def __init__(self, scorer: Scorer, node: str) -> None:
        self._scorer = scorer
        self._node = node

    def observe(self, event: DecodeAccess) -> None:
        """Nothing: the scorer has observed it."""

    def ranks(self) -> Ranks:
        return self._scorer.ranks(self._node)
