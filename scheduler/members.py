"""The policies that may be in charge of a node, and what they are made of."""

from __future__ import annotations

import numpy as np

from proto.redis_schema import DecodeAccess
from scheduler.config import SchedulerConfig
from scheduler.policy.decayed import Decayed
from scheduler.policy.lfru import Lfru
from scheduler.policy.lru import Lru
from scheduler.policy.ranking import RankingPolicy, Ranks
from scheduler.scorer import Scorer


class Members:
    """Makes them for one node after another. The node's fallback is the first."""

    names = ("decayed", "lru", "lfru", "river")

    def __init__(self, config: SchedulerConfig, scorer: Scorer) -> None:
        self._shape = (config.num_layers, config.num_experts)
        self._half_life_tokens = config.decayed_half_life_tokens
        self._scorer = scorer

    def of(self, node: str) -> dict[str, RankingPolicy]:
        """By name, simplest first."""
        return {
            "decayed": Decayed(self._shape, self._half_life_tokens),
            "lru": Lru(self._shape),
            "lfru": Lfru(self._shape),
            "river": ScoredNode(self._scorer, node, self._shape),
        }


class ScoredNode:
    """What the scorer says of one node, as a policy; the scorer hears the evidence by itself."""

    def __init__(self, scorer: Scorer, node: str, shape: tuple[int, int]) -> None:
        self._scorer = scorer
        self._node = node
        self._unscored = np.zeros(shape)

    def observe(self, event: DecodeAccess) -> None:
        """Nothing: the scorer has observed it."""

    def ranks(self) -> Ranks:
        scores = self._scorer.scores(self._node)
        return self._unscored if scores is None else scores.astype(np.float64)
