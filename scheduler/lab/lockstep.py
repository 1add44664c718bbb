"""Replays one trace under several budgets at once, asking a policy that ranks only once a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from proto.access import DecodeAccess
from scheduler.policy.hedged import Hedged
from scheduler.simulate.ranking import AdvisingPolicy, RankingPolicy, Ranks
from scheduler.simulate.replay import Outcome, RankedCache, ReplayCache, Setting, slots_of

Make = Callable[[Setting], ReplayCache]


class Shared:
    """A policy that several caches tell of the same event, and that hears it once."""

    def __init__(self, policy: RankingPolicy) -> None:
        self._policy = policy
        self._newest: DecodeAccess | None = None
        self._ranks = policy.ranks()
        self._newest_heard: DecodeAccess | None = None
        self._heard = self._ranks

    def observe(self, event: DecodeAccess) -> None:
        """One more decode step; the same event again changes nothing."""
        if event is not self._newest:
            self._newest = event
            self._policy.observe(event)
            self._ranks = self._policy.ranks()

    def ranks(self) -> Ranks:
        return self._ranks

    def unused_ranks(self) -> Ranks:
        policy = self._policy
        return policy.unused_ranks() if isinstance(policy, AdvisingPolicy) else self._ranks

    def heard_ranks(self, event: DecodeAccess) -> Ranks:
        """Of the ranks before this event, though a cache before has observed it."""
        if event is not self._newest_heard:
            policy, self._newest_heard, self._heard = self._policy, event, self._ranks
            if isinstance(policy, AdvisingPolicy):
                self._heard = policy.heard_ranks(event)
        return self._heard


def caches_of(settings: Sequence[Setting], make: Make) -> list[ReplayCache]:
    """One a setting, all of one trace and lag; ranking policies, a hedge's too, are shared."""
    first = make(settings[0])
    if isinstance(first, RankedCache):
        shared = Shared(first.policy)
        return [RankedCache(shared, slots_of(setting), first.lag_steps) for setting in settings]
    if isinstance(first, Hedged):
        members = {
            name: (Shared(member.policy), member.lag_steps)
            for name, member in first.members.items()
        }
        return [_hedged(setting, members) for setting in settings]
    return [first, *(make(setting) for setting in settings[1:])]


def _hedged(setting: Setting, members: Mapping[str, tuple[Shared, int]]) -> Hedged:
    caches = {
        name: RankedCache(shared, slots_of(setting), lag_steps)
        for name, (shared, lag_steps) in members.items()
    }
    return Hedged(caches, slots_of(setting))


def replay_together(settings: Sequence[Setting], make: Make) -> list[Outcome]:
    """By setting, what `replay` finds for each alone; us_per_step is of all of them together."""
    caches = caches_of(settings, make)
    misses = [0] * len(settings)
    trace = settings[0].trace
    began_s = time.perf_counter()
    for step, event in enumerate(trace.events()):
        for number, (setting, cache) in enumerate(zip(settings, caches, strict=True)):
            hits = cache.step(event)
            if step >= setting.warmup_steps:
                misses[number] += int(np.count_nonzero(~hits))
    us_per_step = (time.perf_counter() - began_s) * 1e6 / trace.num_steps
    return [
        Outcome(1 - missed / setting.num_accesses, missed, us_per_step)
        for setting, missed in zip(settings, misses, strict=True)
    ]
