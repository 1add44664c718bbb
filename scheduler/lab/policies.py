"""Every policy that a trace can be replayed through, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from proto.redis_schema import POOL
from scheduler.learn.followers import Followers
from scheduler.learn.forecaster import Forecaster
from scheduler.policy.arc import Arc
from scheduler.policy.belady import Belady
from scheduler.policy.decayed import Decayed
from scheduler.policy.flashmoe import FlashMoe, Net
from scheduler.policy.hedged import Hedged
from scheduler.policy.importance import Importance
from scheduler.policy.learned import Learned
from scheduler.policy.lecar import LeCar
from scheduler.policy.lfru import Lfru
from scheduler.policy.lfu import Lfu
from scheduler.policy.lru import Lru
from scheduler.policy.river import River, RiverSettings
from scheduler.policy.s3fifo import S3Fifo
from scheduler.simulate.queues import QueueCache, QueuePolicy
from scheduler.simulate.ranking import RankingPolicy
from scheduler.simulate.replay import RankedCache, ReplayCache, Setting, ranked, slots_of
from scheduler.simulate.trace import AccessTrace, TraceInvalid

Lesson = TypeVar("Lesson")


@dataclass(frozen=True)
class Background:
    """What a learned policy may know before the replay. train: None, nothing.

    One background serves replays of many cache sizes: what was learned once is kept.
    """

    train: AccessTrace | None = None
    _learned: dict[Any, Any] = field(default_factory=dict, repr=False)

    def learned(self, learn: Callable[[AccessTrace], Lesson]) -> Lesson | None:
        """What `learn` makes of the training trace; None without one."""
        if self.train is None:
            return None
        if learn not in self._learned:
            self._learned[learn] = learn(self.train)
        return cast(Lesson, self._learned[learn])


def train_forecaster(trace: AccessTrace) -> Forecaster:
    """Calibrate; minutes."""
    from scheduler.lab.calibration import calibrate  # imports torch
    from scheduler.lab.calibration_settings import CalibrationSettings

    return calibrate(trace, CalibrationSettings())


Maker = Callable[[Setting, Background], ReplayCache]


def queued(setting: Setting, make: Callable[[int, int], QueuePolicy]) -> QueueCache:
    """make: a policy, of its slots and the number of its layer."""
    trace, pooled = setting.trace, setting.scope == POOL
    slots = setting.slots * (trace.num_layers if pooled else 1)
    return QueueCache(lambda layer: make(slots, layer), trace.shape, pooled=pooled)


def river(setting: Setting) -> River:
    """River from nothing."""
    settings, shape = RiverSettings(), setting.trace.shape
    features = settings.new_features(shape, Followers(*shape))
    return River(settings, settings.new_model(), features)


def learned(setting: Setting, background: Background) -> RankingPolicy:
    """What the training trace taught; River from nothing without one."""
    forecaster = background.learned(train_forecaster)
    if forecaster is None:
        return river(setting)
    settings, shape = RiverSettings(), setting.trace.shape
    return Learned(forecaster, settings.new_features(shape, Followers(*shape), forecaster.memory()))


def hedged(setting: Setting, background: Background) -> Hedged:
    """Over what may be in charge live: simplest first; importance when the trace has scores,
    learned when there is something to learn from.
    """
    scored = ["importance"] if setting.trace.router_scores is not None else []
    learned = ["learned"] if background.train else []
    names = ["decayed", "lru", "lfru", *scored, "river", *learned]
    members = {name: cast(RankedCache, POLICIES[name](setting, background)) for name in names}
    return Hedged(members, slots_of(setting))


def importance(setting: Setting) -> Importance:
    """Raises TraceInvalid for a trace without the scores it goes by."""
    if setting.trace.router_scores is None:
        raise TraceInvalid(
            f"{setting.trace.name} has no router scores, which importance goes by: record one with "
            "`flashmoe record --scores`"
        )
    return Importance(setting.trace.shape, setting.half_life_tokens)


def learn_flashmoe(trace: AccessTrace) -> Net:
    """Train the nets of the `flashmoe` policy on a trace; minutes."""
    from scheduler.lab.imitation import imitate_belady  # imports torch

    return imitate_belady(trace)


POLICIES: dict[str, Maker] = {
    "lru": lambda setting, _: ranked(setting, Lru(setting.trace.shape)),
    "lfu": lambda setting, _: ranked(setting, Lfu(setting.trace.shape)),
    "lfru": lambda setting, _: ranked(setting, Lfru(setting.trace.shape)),
    "decayed": lambda setting, _: ranked(
        setting, Decayed(setting.trace.shape, setting.half_life_tokens)
    ),
    "importance": lambda setting, _: ranked(setting, importance(setting)),
    "arc": lambda setting, _: queued(setting, lambda slots, _: Arc(slots)),
    "s3fifo": lambda setting, _: queued(setting, lambda slots, _: S3Fifo(slots)),
    "lecar": lambda setting, _: queued(setting, LeCar),
    "flashmoe": lambda setting, background: ranked(
        setting,
        FlashMoe(setting.trace.shape, background.learned(learn_flashmoe), learn_flashmoe),
    ),
    "river": lambda setting, _: ranked(setting, river(setting), advised=True),
    "learned": lambda setting, background: ranked(
        setting, learned(setting, background), advised=True
    ),
    "hedged": hedged,
    "min": lambda setting, _: ranked(
        setting, Belady(setting.trace.topk_ids, setting.trace.num_experts)
    ),
}
