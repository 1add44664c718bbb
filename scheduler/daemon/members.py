"""The policies that may be in charge of a node, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable

from proto.access import DecodeAccess
from proto.redis_schema import IMPORTANCE_POLICY
from scheduler.config import SchedulerConfig
from scheduler.daemon.scorer import Scorer
from scheduler.learn.forecaster import Forecaster
from scheduler.policy.decayed import Decayed
from scheduler.policy.importance import Importance
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
        shape = (config.num_layers, config.num_experts)
        self._makers: dict[str, Callable[[str], RankingPolicy]] = {
            "decayed": lambda node: Decayed(shape, config.decayed_half_life_tokens),
            "lru": lambda node: Lru(shape),
            "lfru": lambda node: Lfru(shape),
        }
        if config.runs_importance:
            self._makers[IMPORTANCE_POLICY] = lambda node: Importance(
                shape, config.decayed_half_life_tokens
            )
        self._makers["river"] = lambda node: ScoredNode(scorer, node)
        if forecaster is not None:
            self._makers["learned"] = lambda node: Learned(forecaster, scorer.features(node))

    @property
    def names(self) -> tuple[str, ...]:
        """Simplest first."""
        return tuple(self._makers)

    def of(self, node: str) -> dict[str, RankingPolicy]:
        """By name, simplest first, for a node that the scorer has heard."""
        return {name: make(node) for name, make in self._makers.items()}


class ScoredNode:
    """The scorer's learner for one node; the scorer tells it of the evidence by itself."""

    def __init__(self, scorer: Scorer, node: str) -> None:
        self._scorer = scorer
        self._node = node

    def observe(self, event: DecodeAccess) -> None:
        """Nothing: the scorer has observed it."""

    def ranks(self) -> Ranks:
        return self._scorer.ranks(self._node)
