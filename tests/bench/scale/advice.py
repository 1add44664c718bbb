"""What the scheduler would tell of a segment, ahead of time: it follows from the routing alone."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expert_store.manifest.manifest import Manifest
from proto.access import DecodeAccess
from proto.redis_schema import Advice
from scheduler.config import FORECASTER_NAME
from scheduler.lab.calibration import calibrate
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.learn.followers import Followers
from scheduler.learn.forecaster import Forecaster
from scheduler.policy.learned import Learned
from scheduler.policy.river import River, RiverSettings
from scheduler.simulate.ranking import RankingPolicy, Ranks
from scheduler.simulate.trace import AccessTrace


@dataclass(frozen=True)
class Told:
    """Scores of every step. One step late, as live: step t is decided by what was known before.

    scores:      [T + 1, L, E], after so many steps
    us_per_step: of learning and scoring, which the scheduler's process would spend
    """

    name: str
    scores: NDArray[np.float32]
    us_per_step: float = 0.0

    @classmethod
    def by(cls, name: str, policy: RankingPolicy, trace: AccessTrace) -> Told:
        """As a policy ranks that hears the trace once."""
        began_s = time.perf_counter()
        scores = [policy.ranks()]
        for event in trace.events():
            policy.observe(event)
            scores.append(policy.ranks())
        elapsed_s = time.perf_counter() - began_s
        return cls(name, np.stack(scores).astype(np.float32), elapsed_s * 1e6 / trace.num_steps)

    def advice(self, step: int) -> Advice:
        return Advice(self.name, step, 0, 1.0, self.scores[step])


class Following:
    """Ranks by what was told, for the scheduler's own replay."""

    def __init__(self, told: Told) -> None:
        self._scores = iter(told.scores)
        self._now = next(self._scores)

    def observe(self, event: DecodeAccess) -> None:
        self._now = next(self._scores)

    def ranks(self) -> Ranks:
        ranks: Ranks = self._now.astype(np.float64)
        return ranks


def told_by(trace: AccessTrace, forecaster: Forecaster | None) -> dict[str, Told]:
    """By name: River, from nothing, and what was calibrated, if anything."""
    settings, shape = RiverSettings(), trace.shape
    features = settings.new_features(shape, Followers(*shape))
    policies: dict[str, RankingPolicy] = {"river": River(settings, settings.new_model(), features)}
    if forecaster is not None:
        known = settings.new_features(shape, Followers(*shape), forecaster.memory())
        policies["learned"] = Learned(forecaster, known)
    return {name: Told.by(name, policy, trace) for name, policy in policies.items()}


def trained(train: AccessTrace, manifest: Manifest, store_dir: Path) -> Forecaster:
    """As `flashmoe calibrate STORE --trace` would; kept beside the manifest."""
    path = store_dir / FORECASTER_NAME
    if path.exists():
        return Forecaster.load(path)
    began_s = time.perf_counter()
    settings = CalibrationSettings()
    forecaster = calibrate(train, settings, fingerprint=manifest.spec.fingerprint)
    forecaster.save(path)
    print(f"calibrated in {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
    return forecaster
