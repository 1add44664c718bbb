"""Scores every expert of every node from evidence; one state a node, one model for all."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from proto import errors
from proto.access import DecodeAccess, PrefillAccess
from proto.expert import ExpertKey
from proto.stats import counter
from scheduler.config import SchedulerConfig
from scheduler.learn.features import Features
from scheduler.learn.followers import Followers
from scheduler.learn.forecaster import Forecaster
from scheduler.learn.learner import Contribution
from scheduler.policy.river import River, RiverSettings
from scheduler.simulate.ranking import Ranks


@dataclass(frozen=True)
class Explanation:
    """Why an expert scores as it does: the bias and the contributions are its log odds."""

    score: float
    bias: float
    contributions: list[Contribution]


@dataclass
class _Node:
    river: River
    sequence: str = field(default="")
    step: int = field(default=0)


class Scorer:
    """`observe` learns and returns nothing; `ranks` and `explain` ask and change nothing.

    forecaster: what it remembers, every node may recall

    steps_missed:    decode steps of a sequence that never arrived
    lessons_skipped: events that only moved the state, because there were too many
    """

    events_seen: int = counter("flashmoe_scheduler_events_seen", "events seen")
    steps_missed: int = counter("flashmoe_scheduler_steps_missed", "steps missed")
    lessons_skipped: int = counter("flashmoe_scheduler_lessons_skipped", "lessons skipped")
    nodes_dropped: int = counter("flashmoe_scheduler_nodes_dropped", "nodes dropped")

    def __init__(
        self, config: SchedulerConfig, forecaster: Forecaster | None = None, seed: int = 0
    ) -> None:
        self._config = config
        self._known = () if forecaster is None else (forecaster.memory(),)
        self._layer_index = {layer: index for index, layer in enumerate(config.moe_layers)}
        self._nodes: OrderedDict[str, _Node] = OrderedDict()  # least recently heard first
        self._shape = (config.num_layers, config.num_experts)
        self._settings = RiverSettings(
            config.horizon_steps,
            config.half_lives_tokens,
            config.learn_rows_per_step,
            config.recall_steps,
        )
        self._followers = Followers(config.num_layers, config.num_experts)
        self._seed = seed
        self.model = self._settings.new_model()

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes we keep state of, least recently heard first."""
        return list(self._nodes)

    def observe(self, event: DecodeAccess | PrefillAccess, *, learn: bool = True) -> None:
        """Take in one event: settle questions, update the state, ask new ones. Never peeks ahead.

        Without `learn` only the state follows. Raises MessageInvalid for another model's shape.
        """
        self._check(event)
        self.events_seen += 1
        node = self._node(event.node)
        if isinstance(event, PrefillAccess):
            node.river.observe_prefill(event)
            return
        self._count_missed(node, event)
        node.river.observe(event, learn=learn)
        if not learn:
            self.lessons_skipped += 1

    def features(self, node: str) -> Features:
        """Of a node that was heard, as it is updated with every event."""
        return self._nodes[node].river.features

    def ranks(self, node: str) -> Ranks:
        """[L, E], P(used within the horizon), as far as it is known yet."""
        return self._nodes[node].river.ranks()

    def explain(self, key: ExpertKey) -> Explanation:
        """As the node heard last sees it. Raises UnknownExpert; NotReady before any evidence."""
        layer = self._layer_index.get(key.layer)
        if layer is None or not 0 <= key.expert < self._config.num_experts:
            raise errors.UnknownExpert(f"{key} is not an expert of this model")
        if not self._nodes:
            raise errors.NotReady("no evidence yet: generate a few tokens first")
        features = next(reversed(self._nodes.values())).river.features
        rows = features.rows(np.array([layer]), np.array([key.expert]))
        return Explanation(
            score=float(self.model.predict(rows.T)[0]),
            bias=self.model.bias,
            contributions=self.model.explain(rows[0].tolist()),
        )

    def _check(self, event: DecodeAccess | PrefillAccess) -> None:
        if isinstance(event, PrefillAccess):
            shape = event.token_counts.shape
        else:
            shape = (len(event.topk_ids), event.num_experts)
        if shape != (self._config.num_layers, self._config.num_experts):
            raise errors.MessageInvalid(f"evidence of {shape} [layers, experts]: another model's")

    def _node(self, name: str) -> _Node:
        if name not in self._nodes:
            self._nodes[name] = self._new_node()
        self._nodes.move_to_end(name)
        while len(self._nodes) > self._config.max_nodes:
            self._nodes.popitem(last=False)
            self.nodes_dropped += 1
        return self._nodes[name]

    def _new_node(self) -> _Node:
        features = self._settings.new_features(self._shape, self._followers, *self._known)
        seed = self._seed + len(self._nodes)
        return _Node(River(self._settings, self.model, features, seed))

    def _count_missed(self, node: _Node, event: DecodeAccess) -> None:
        if event.sequence == node.sequence:
            self.steps_missed += max(0, event.step - node.step - 1)
        node.sequence, node.step = event.sequence, event.step
