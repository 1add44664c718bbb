"""Learns online, with River, which experts are used again within a horizon; starts from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proto.access import DecodeAccess, PrefillAccess
from scheduler.learn.features import Features, feature_names
from scheduler.learn.followers import Followers
from scheduler.learn.labels import DelayedLabels, Questions
from scheduler.learn.learner import ReuseModel
from scheduler.learn.recall import Recall, StepMemory
from scheduler.simulate.ranking import Ranks


@dataclass(frozen=True)
class RiverSettings:
    """What is learned, from what, and how much of it a step. See the keys of [scheduler]."""

    horizon_steps: int = 8
    half_lives_tokens: Sequence[float] = (2.0, 8.0, 16.0, 64.0)
    learn_rows_per_step: int = 32
    recall_steps: int = 8192

    def new_model(self) -> ReuseModel:
        return ReuseModel(feature_names(self.half_lives_tokens))

    def new_features(
        self, shape: tuple[int, int], followers: Followers, *known: StepMemory
    ) -> Features:
        """Of one node. known: memories that it may look into beside its own."""
        own = StepMemory(shape, self.recall_steps)
        return Features(shape, self.half_lives_tokens, followers, Recall(shape, *known, own))


class River:
    """Ranks by P(used within the horizon), [0, 1], of one node's stream.

    model: may be shared with other nodes; features: with other policies of this node
    """

    def __init__(
        self, settings: RiverSettings, model: ReuseModel, features: Features, seed: int = 0
    ) -> None:
        self._settings = settings
        self._model = model
        self._labels = DelayedLabels(
            settings.horizon_steps, settings.learn_rows_per_step, len(model.names)
        )
        self._random = np.random.default_rng(seed)
        self.features = features

    def observe(self, event: DecodeAccess, *, learn: bool = True) -> None:
        """Settle questions, update the state, ask new ones. Never peeks ahead.

        Without `learn` only the state follows.
        """
        answers = self._labels.answer(self.features.used(event))
        self.features.update(event)
        if learn:
            self._model.learn(answers)
            self._ask()

    def observe_prefill(self, event: PrefillAccess) -> None:
        """A prompt chunk moves the frequencies; no step passes."""
        self.features.update_prefill(event)

    def ranks(self) -> Ranks:
        """P(used within the horizon)."""
        return self._model.predict(self.features.table())

    def _ask(self) -> None:
        """Ask of experts drawn at random, and note what model and baseline say now."""
        size = self._settings.learn_rows_per_step
        layers, experts = (self._random.integers(top, size=size) for top in self.features.shape)
        rows = self.features.rows(layers, experts)
        predicted = self._model.predict(rows.T)
        self._labels.ask(Questions(layers, experts, rows, predicted, self._model.base_rate))
