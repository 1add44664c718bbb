"""Every policy that a trace can be replayed through, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.policy.belady import Belady
from scheduler.policy.decayed import Decayed
from scheduler.policy.lfru import Lfru
from scheduler.policy.lfu import Lfu
from scheduler.policy.lru import Lru
from scheduler.replay import ReplayCache, Setting, ranked
from scheduler.trace import AccessTrace


@dataclass(frozen=True)
class Background:
    """What a learned policy may know before the replay. train: None, nothing."""

    train: AccessTrace | None = None


Maker = Callable[[Setting, Background], ReplayCache]

POLICIES: dict[str, Maker] = {
    "lru": lambda setting, _: ranked(setting, Lru(setting.trace.shape)),
    "lfu": lambda setting, _: ranked(setting, Lfu(setting.trace.shape)),
    "lfru": lambda setting, _: ranked(setting, Lfru(setting.trace.shape)),
    "decayed": lambda setting, _: ranked(setting, Decayed(setting.trace.shape)),
    "min": lambda setting, _: ranked(
        setting, Belady(setting.trace.topk_ids, setting.trace.num_experts)
    ),
}
