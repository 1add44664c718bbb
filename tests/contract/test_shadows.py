"""Shadows and the node agree: on its capacity, on what its own policies hit, and on what following
the advice comes to.

Planted faults seen red: the remainder of the slots given to the last layers; shadows of scores that
know the step they decide; a hedge that is told the same of everybody;
gates that do not travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from proto.access import DecodeAccess, decode_access
from proto.redis_schema import Advice
from scheduler.policy.decayed import Decayed
from scheduler.policy.hedged import Hedged
from scheduler.policy.importance import Importance
from scheduler.policy.lfru import Lfru
from scheduler.policy.lru import Lru
from scheduler.shadow.advisor import Advisor
from scheduler.simulate.ranking import RankingPolicy, Ranks
from scheduler.simulate.replay import RankedCache, Setting, ranked, replay, slots_of
from tests.fakes import FakeLender, make_capacity
from tests.scheduler.replays import recorded, scored
from tests.scheduler.traces import on_the_wire

TRACE = recorded()
LAYERS = tuple(range(1, 2 * TRACE.num_layers, 2))


class Clairvoyant:
    """Knows the whole trace but tells in steps of 1/1024, so that float32 holds what float64 does:
    shares of the next 32 steps that use each expert.
    """

    def __init__(self) -> None:
        uses = np.concatenate([TRACE.used(), np.zeros((33, *TRACE.shape), np.bool_)])
        self._ahead = np.cumsum(uses, axis=0, dtype=np.int64)
        self._num_steps = 0

    def observe(self, event: DecodeAccess) -> None:
        self._num_steps += 1

    def ranks(self) -> Ranks:
        now = self._ahead[max(0, self._num_steps - 1)]
        soon, later = (self._ahead[self._num_steps + ahead] - now for ahead in (4, 31))
        return (16 * np.minimum(soon, 8) + later) / 1024


def members(_: str) -> Mapping[str, RankingPolicy]:
    shape = TRACE.shape
    return {
        "decayed": Decayed(shape),
        "lru": Lru(shape),
        "lfru": Lfru(shape),
        "importance": Importance(shape),
        "river": Clairvoyant(),
    }


class Node:
    """The cache that runs live, telling its evidence to an advisor and following its advice."""

    def __init__(self, slots: int, scope: str, policy: str, advisor: Advisor) -> None:
        capacity = make_capacity(slots, LAYERS, TRACE.top_k, scope == "pool")
        self._advice: Advice | None = None
        chooser = PolicyChooser(
            policy,
            16.0,
            LAYERS,
            TRACE.num_experts,
            lambda: self._advice,
            weighs=policy == "importance",
        )
        self._chooser = chooser
        self._cache = ExpertCache(FakeLender(slots), capacity, chooser)
        self._cache.open()
        self._evidence = {"slots": slots, "scope": scope, "node": "live"}
        self._advisor = advisor

    def step(self, event: DecodeAccess) -> int:
        """Its hits."""
        rows = []
        for row, experts in enumerate(event.topk_ids.tolist()):
            layer = LAYERS[row]
            if event.gates is not None:
                self._chooser.weigh(layer, event.gates[row].astype(np.float64))
            hits, waves = self._cache.step(layer, sorted(experts))
            assert sum(len(wave) for wave in waves) == len(experts)
            rows.append([expert in hits for expert in experts])
        sent = replace(event, **self._evidence, hits=np.array(rows))  # type: ignore[arg-type]
        received = decode_access(on_the_wire(sent.encode()))
        assert isinstance(received, DecodeAccess)
        self._advisor.observe(received)
        verdict = self._advisor.advise("live")
        self._advice = Advice.decode(Advice(verdict.policy, 1, 0, 1.0, verdict.scores).encode())
        return int(np.count_nonzero(rows))


@pytest.mark.parametrize("scope", ["layer", "pool"])
@pytest.mark.parametrize("policy", ["lru", "lfru", "decayed", "importance"])
def test_a_nodes_own_policy_hits_what_its_shadow_does(policy: str, scope: str) -> None:
    """101 slots are no multiple of 8 layers: five layers have one more."""
    advisor = Advisor(("decayed",), members, 64, policy)
    node = Node(101, scope, policy, advisor)
    trace = scored() if policy == "importance" else TRACE
    for event in trace.events():
        node.step(event)
    [report] = advisor.reports()
    assert report.actual == report.policies[policy]


@pytest.mark.parametrize("scope", ["layer", "pool"])
def test_following_the_advice_is_replaying_hedged(scope: str) -> None:
    """Local policies with no lag, scores one step late, whoever is in charge."""
    advisor = Advisor(("decayed", "lru", "lfru", "river"), members, 64)
    node = Node(12 * TRACE.num_layers, scope, "auto", advisor)
    hits = sum(node.step(event) for event in TRACE.events())
    setting = Setting(TRACE, 12, scope, warmup_steps=0, lag_steps=1)
    caches: dict[str, RankedCache] = {
        name: ranked(setting, policy, advised=name == "river")
        for name, policy in members("replay").items()
    }
    hedged = Hedged(caches, slots_of(setting))
    assert replay(setting, hedged).misses == TRACE.topk_ids.size - hits
    [report] = advisor.reports()
    assert (report.in_charge, report.switches) == ("river", hedged.hedge.num_switches)
    assert report.switches > 0
    alone = replay(setting, ranked(setting, Clairvoyant(), advised=True))
    assert report.policies["river"].hit_ratio == pytest.approx(alone.hit_ratio)
