"""The live cache and replay count the same misses on the same events.

Planted faults seen red: age off by one in the node's LFRU, ties by expert alone in the node's pool,
ranks of the present step where advice lags, gates weighed after the
layer's step, a decay by another half-life in replay; what layers
have said not begun anew with a step, a layer heard before the advice corrected, scores of unused
experts taken for layers that are still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policies.heard import Heard
from compute_node.cache.policy_chooser import PolicyChooser
from proto.access import DecodeAccess
from proto.correction import Correction, corrected, shapes
from proto.redis_schema import Advice
from scheduler.lab.policies import POLICIES, Background
from scheduler.policy.decayed import Decayed
from scheduler.policy.lfru import Lfru
from scheduler.simulate.ranking import RankingPolicy, Ranks
from scheduler.simulate.replay import RankedCache, Setting, ranked, replay
from scheduler.simulate.trace import AccessTrace
from tests.fakes import FakeLender, make_capacity
from tests.scheduler.replays import recorded, scored

HALF_LIFE_TOKENS = 16.0
SCOPES = ("layer", "pool")


class LiveCache:
    """A node's cache, a step at a time. Its model layers are 1, 3, 5, ..."""

    def __init__(
        self,
        trace: AccessTrace,
        setting: Setting,
        policy: str,
        advice: Callable[[], Advice | None],
        heard: Heard | None = None,
    ) -> None:
        self._layers = tuple(range(1, 2 * trace.num_layers, 2))
        slots = setting.slots * trace.num_layers
        capacity = make_capacity(slots, self._layers, trace.top_k, setting.scope == "pool")
        chooser = PolicyChooser(
            policy,
            HALF_LIFE_TOKENS,
            self._layers,
            trace.num_experts,
            advice,
            heard,
            weighs=policy == "importance",
        )
        self._chooser = chooser
        self._cache = ExpertCache(FakeLender(slots), capacity, chooser)
        self._cache.open()

    def step(self, event: DecodeAccess) -> np.ndarray:
        rows = []
        for row, experts in enumerate(event.topk_ids.tolist()):
            layer = self._layers[row]
            if event.gates is not None:
                self._chooser.weigh(layer, event.gates[row].astype(np.float64))
            hits, waves = self._cache.step(layer, sorted(experts))
            assert sum(len(wave) for wave in waves) == len(experts)
            rows.append([expert in hits for expert in experts])
        return np.array(rows)


def no_advice() -> Advice | None:
    return None


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("slots", [4, 6, 12, 24])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "decayed", "importance"])
def test_local_policies_hit_alike_use_by_use(policy: str, slots: int, scope: str) -> None:
    trace = scored() if policy == "importance" else recorded()
    setting = Setting(trace, slots, scope, warmup_steps=0)
    live = LiveCache(trace, setting, policy, no_advice)
    replayed = POLICIES[policy](setting, Background())
    for event in trace.events():
        np.testing.assert_array_equal(replayed.step(event), live.step(event))


class Whimsical:
    """Scores without sense or ties, new at every step: the order they make is all that counts."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._random = np.random.default_rng(0)
        self._shape = shape
        self._ranks = np.zeros(shape)

    def observe(self, event: DecodeAccess) -> None:
        drawn = self._random.permutation(self._shape[0] * self._shape[1])
        self._ranks = drawn.reshape(self._shape).astype(np.float64)

    def ranks(self) -> Ranks:
        return self._ranks


class Corrected(Whimsical):
    """Scores of two kinds, and a correction that turns them upside down."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        layers, experts = shape
        weights = np.random.default_rng(1).standard_normal
        sizes = shapes(layers, experts, width=6)
        self.correction = Correction.of(
            {name: 0.3 * weights(size).astype(np.float32) for name, size in sizes.items()}
        )

    def ranks(self) -> Ranks:
        return super().ranks() / self._ranks.size

    def unused_ranks(self) -> Ranks:
        return self.ranks()[::-1, ::-1]

    def heard_ranks(self, event: DecodeAccess) -> Ranks:
        odds = self.correction.odds(event.topk_ids)
        ranks: Ranks = corrected(self.unused_ranks(), odds.astype(np.float64))
        return ranks


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("slots", [6, 12])
def test_advice_is_corrected_live_as_in_replay(slots: int, scope: str) -> None:
    """Advice of the step before is there when a step begins; each layer then corrects its own."""
    trace = recorded()
    setting = Setting(trace, slots, scope, warmup_steps=0, lag_steps=1)
    replayed = ranked(setting, Corrected(trace.shape), advised=True)
    policy, clock = Corrected(trace.shape), count(1)
    published: list[Advice] = []

    def publish() -> None:
        tables = (policy.ranks().astype(np.float32), policy.unused_ranks().astype(np.float32))
        published.append(Advice("scored", 1, 0, 1.0, *tables, as_of_ns=next(clock)))

    publish()
    heard = Heard(policy.correction, trace.top_k, lambda: next(clock))
    live = LiveCache(trace, setting, "auto", lambda: published[-1], heard)
    for event in trace.events():
        np.testing.assert_array_equal(replayed.step(event), live.step(event))
        policy.observe(event)
        publish()


def advised_misses(policy: RankingPolicy, setting: Setting) -> int:
    """Live, by the scores that were published before the step: one step old."""
    published: list[Ranks] = [policy.ranks()]

    def advice() -> Advice:
        return Advice("scored", 1, 0, 1.0, published[-1].astype(np.float32))

    live = LiveCache(setting.trace, setting, "auto", advice)
    misses = 0
    for event in setting.trace.events():
        misses += int((~live.step(event)).sum())
        policy.observe(event)
        published.append(policy.ranks())
    return misses


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("slots", [6, 12])
@pytest.mark.parametrize("policy", [Lfru, Whimsical])
def test_advised_scores_count_as_replay_with_a_lag_of_one(
    policy: Callable[[tuple[int, int]], RankingPolicy], slots: int, scope: str
) -> None:
    trace = recorded()
    setting = Setting(trace, slots, scope, warmup_steps=0, lag_steps=1)
    cache = ranked(setting, policy(trace.shape), advised=True)
    assert isinstance(cache, RankedCache)
    assert replay(setting, cache).misses == advised_misses(policy(trace.shape), setting)


def test_a_lag_changes_what_is_counted() -> None:
    """Else the test above could not fail."""
    trace = recorded()
    missed = [
        replay(setting, ranked(setting, Whimsical(trace.shape), advised=True)).misses
        for setting in (Setting(trace, 12, warmup_steps=0, lag_steps=lag) for lag in (0, 1))
    ]
    assert missed[0] != missed[1]


def test_charge_and_replay_agree_on_the_half_life() -> None:
    trace = recorded()
    setting = Setting(trace, 12, warmup_steps=0)
    assert (
        replay(setting, ranked(setting, Decayed(trace.shape, HALF_LIFE_TOKENS))).misses
        == replay(setting, POLICIES["decayed"](setting, Background())).misses
    )
