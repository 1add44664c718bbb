"""Every policy that a trace can be replayed through, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from proto.redis_schema import POOL
from scheduler.policy.arc import Arc
from scheduler.policy.belady import Belady
from scheduler.policy.decayed import Decayed
from scheduler.policy.flashmoe import FlashMoe, learn_flashmoe
from scheduler.policy.lecar import LeCar
from scheduler.policy.lfru import Lfru
from scheduler.policy.lfu import Lfu
from scheduler.policy.lru import Lru
from scheduler.policy.s3fifo import S3Fifo
from scheduler.queues import QueueCache, QueuePolicy
from scheduler.replay import ReplayCache, Setting, ranked
from scheduler.trace import AccessTrace

Learned = TypeVar("Learned")


@dataclass(frozen=True)
class Background:
    """What a learned policy may know before the replay. train: None, nothing.

    One background serves replays of many cache sizes: what was learned once is kept.
    """

    train: AccessTrace | None = None
    _learned: dict[Any, Any] = field(default_factory=dict, repr=False)

    def learned(self, learn: Callable[[AccessTrace], Learned]) -> Learned | None:
        """What `learn` makes of the training trace; None without one."""
        if self.train is None:
            return None
        if learn not in self._learned:
            self._learned[learn] = learn(self.train)
        return cast(Learned, self._learned[learn])


Maker = Callable[[Setting, Background], ReplayCache]


def queued(setting: Setting, make: Callable[[int, int], QueuePolicy]) -> QueueCache:
    """make: a policy, of its slots and the number of its layer."""
    trace, pooled = setting.trace, setting.scope == POOL
    slots = setting.slots * (trace.num_layers if pooled else 1)
    return QueueCache(lambda layer: make(slots, layer), trace.shape, pooled=pooled)


POLICIES: dict[str, Maker] = {
    "lru": lambda setting, _: ranked(setting, Lru(setting.trace.shape)),
    "lfu": lambda setting, _: ranked(setting, Lfu(setting.trace.shape)),
    "lfru": lambda setting, _: ranked(setting, Lfru(setting.trace.shape)),
    "decayed": lambda setting, _: ranked(setting, Decayed(setting.trace.shape)),
    "arc": lambda setting, _: queued(setting, lambda slots, _: Arc(slots)),
    "s3fifo": lambda setting, _: queued(setting, lambda slots, _: S3Fifo(slots)),
    "lecar": lambda setting, _: queued(setting, LeCar),
    "flashmoe": lambda setting, background: ranked(
        setting, FlashMoe(setting.trace.shape, background.learned(learn_flashmoe))
    ),
    "min": lambda setting, _: ranked(
        setting, Belady(setting.trace.topk_ids, setting.trace.num_experts)
    ),
}
