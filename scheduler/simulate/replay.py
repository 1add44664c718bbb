"""Replays an access trace through eviction policies and counts what each would have missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from proto import errors
from proto.access import DecodeAccess
from proto.redis_schema import LAYER, POOL
from scheduler.simulate.ranking import AdvisingPolicy, RankingPolicy, Ranks
from scheduler.simulate.slots import Hits, Slots, check_slots, make_slots
from scheduler.simulate.trace import AccessTrace, TraceInvalid

SCOPES = (LAYER, POOL)


@dataclass(frozen=True)
class Setting:
    """What is replayed under which budget.

    slots:        a layer; in a pool, this times the number of layers
    warmup_steps: the first ones, which are replayed and not counted
    lag_steps:    how old advice is when it decides: 0, evictions of a step know all of that step;
                  1, as live, advice is of the step before, and the node corrects it by what the
                  step has used so far, where that was learned. Local policies have no lag.
    half_life_tokens: of policies whose counts decay
    """

    trace: AccessTrace
    slots: int
    scope: str = LAYER
    warmup_steps: int = 500
    lag_steps: int = 0
    half_life_tokens: float = 16.0

    def __post_init__(self) -> None:
        """Raises InvalidRequest when it is no budget, TraceInvalid when nothing would be left to
        count.
        """
        if self.scope not in SCOPES:
            raise errors.InvalidRequest(f"there is no scope {self.scope!r}: give layer or pool")
        check_slots(self.trace.top_k, self.slots)
        if self.slots >= self.trace.num_experts:
            raise errors.InvalidRequest(
                f"{self.slots} slots a layer hold all {self.trace.num_experts} experts of "
                f"{self.trace.name}, so nothing is ever evicted: give fewer"
            )
        if self.lag_steps not in (0, 1):
            raise errors.InvalidRequest(f"advice cannot lag {self.lag_steps} steps: give 0 or 1")
        if self.warmup_steps < 0:
            raise errors.InvalidRequest(
                f"a warm-up of {self.warmup_steps} steps cannot be: give 0 or more"
            )
        if not self.half_life_tokens > 0:
            raise errors.InvalidRequest(
                f"a half-life of {self.half_life_tokens} tokens cannot be: give more than 0"
            )
        if self.warmup_steps >= self.trace.num_steps:
            raise TraceInvalid(
                f"{self.trace.name} has {self.trace.num_steps} steps, all of them within the "
                f"warm-up of {self.warmup_steps}: give a smaller --warmup or a longer trace"
            )

    @property
    def num_accesses(self) -> int:
        """Experts that the counted steps ask for."""
        counted = self.trace.num_steps - self.warmup_steps
        return counted * self.trace.num_layers * self.trace.top_k


class ReplayCache(Protocol):
    """A policy with its residents."""

    def step(self, event: DecodeAccess) -> Hits:
        """[L, K], which of the step's experts were resident when asked for."""
        ...


class RankedCache:
    """A ranking policy over slots.

    lag_steps:     0 or 1, see Setting
    before, after: [L, E], what the evictions of the last step went by, see Slots.step
    ranks:         [L, E], what is known now
    """

    def __init__(self, policy: RankingPolicy, slots: Slots, lag_steps: int = 0) -> None:
        self.policy = policy
        self._slots = slots
        self.lag_steps = lag_steps
        self.ranks = self.before = self.after = policy.ranks()

    @property
    def resident(self) -> NDArray[np.bool_]:
        """[L, E], now; a view."""
        return self._slots.resident

    def step(self, event: DecodeAccess) -> Hits:
        self.before = self.ranks
        heard = self._heard(event) if self.lag_steps else None
        self.policy.observe(event)
        self.ranks = self.policy.ranks()
        self.after = self.ranks if heard is None else heard
        return self._slots.step(event.topk_ids, self.before, self.after)

    def _heard(self, event: DecodeAccess) -> Ranks:
        """Of layers whose turn in this step has come, by ranks of the step before."""
        policy = self.policy
        return policy.heard_ranks(event) if isinstance(policy, AdvisingPolicy) else self.before


@dataclass(frozen=True)
class Outcome:
    """Of one policy, warm-up excluded. us_per_step: observing, learning, ranking and evicting."""

    hit_ratio: float
    misses: int
    us_per_step: float


CacheMaker = Callable[[Setting], ReplayCache]


def replay(setting: Setting, cache: ReplayCache) -> Outcome:
    """Every event of the trace through one cache, generations one after another, never emptied."""
    misses, events = 0, setting.trace.events()
    began_s = time.perf_counter()
    for step, event in enumerate(events):
        hits = cache.step(event)
        if step >= setting.warmup_steps:
            misses += int(np.count_nonzero(~hits))
    elapsed_s = time.perf_counter() - began_s
    trace = setting.trace
    return Outcome(1 - misses / setting.num_accesses, misses, elapsed_s * 1e6 / trace.num_steps)


def ranked(setting: Setting, policy: RankingPolicy, *, advised: bool = False) -> RankedCache:
    """Over the setting's slots. advised: its ranks come from the scheduler, and may lag."""
    return RankedCache(policy, slots_of(setting), setting.lag_steps if advised else 0)


def slots_of(setting: Setting) -> Slots:
    """Empty ones, under the setting's budget. Raises SlotsTooFew."""
    trace, pooled = setting.trace, setting.scope == POOL
    return make_slots(trace.shape, trace.top_k, setting.slots, pooled=pooled)


def gap_closed(outcome: Outcome, lru: Outcome, optimum: Outcome) -> float | None:
    """Share of the way from LRU to MIN; None when there is no way to go."""
    if optimum.misses == lru.misses:
        return None
    return (outcome.hit_ratio - lru.hit_ratio) / (optimum.hit_ratio - lru.hit_ratio)


def as_document(setting: Setting, outcomes: Mapping[str, Outcome]) -> dict[str, object]:
    """The JSON of `flashmoe replay`. outcomes: by policy, `lru` and `min` among them."""
    trace = setting.trace
    lru, optimum = outcomes["lru"], outcomes["min"]
    return {
        "trace": trace.name,
        "num_steps": trace.num_steps,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "slots": setting.slots,
        "scope": setting.scope,
        "warmup_steps": setting.warmup_steps,
        "lag_steps": setting.lag_steps,
        "half_life_tokens": setting.half_life_tokens,
        "policies": {
            name: {
                "hit_ratio": outcome.hit_ratio,
                "misses": outcome.misses,
                "gap_closed": gap_closed(outcome, lru, optimum),
                "us_per_step": outcome.us_per_step,
            }
            for name, outcome in outcomes.items()
        },
    }
