"""Several budgets in one pass count what each counts alone.

Planted faults seen red: a policy that hears an event once a cache; a hedge whose members forget
their lag.
"""

from __future__ import annotations

import pytest

from scheduler.lab.lockstep import replay_together
from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Setting, replay
from tests.scheduler.replays import recorded

TRACE = recorded()
SETTINGS = [
    Setting(TRACE, slots, scope, warmup_steps=40, lag_steps=1)
    for slots in (6, 12)
    for scope in ("layer", "pool")
]


@pytest.mark.parametrize("name", ["lru", "decayed", "arc", "min", "hedged"])
def test_counts_what_each_counts_alone(name: str) -> None:
    make = POLICIES[name]
    alone = [replay(setting, make(setting, Background())) for setting in SETTINGS]
    together = replay_together(SETTINGS, lambda setting: make(setting, Background()))
    assert [one.misses for one in together] == [one.misses for one in alone]
    assert [one.hit_ratio for one in together] == [one.hit_ratio for one in alone]
