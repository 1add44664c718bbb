"""Reads figures out of what daemons said at the latest look and at those before it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from compute_node.live import words
from compute_node.live.figures import (
    Clients,
    Disk,
    Experts,
    Figures,
    Guarded,
    HeatRow,
    Memory,
    Policies,
    Policy,
    Speed,
    Spread,
)
from compute_node.live.look import NODE, SCHEDULER, STORE, Look
from proto.histogram import Histogram
from proto.memory_report import MemoryReport
from proto.stats import Stats

RECENT_S, MINUTE_S = 5.0, 60.0
_OPTIMUM = "min"


class Looks:
    """The looks of the last minute."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque()

    def add(self, look: Look) -> None:
        self._looks.append(look)
        while look.at_s - self._looks[0].at_s > MINUTE_S:
            self._looks.popleft()

    def figures(self) -> Figures:
        """As of the latest look."""
        look = self._looks[-1]
        node, store = self._changes(NODE), self._changes(STORE)
        return Figures(
            at_s=time.time(),
            away={words.called(words.DAEMONS, name): why for name, why in look.away.items()},
            speed=_speed(*node) if node else Speed(),
            clients=_clients(node[0].now) if node else Clients(),
            experts=_experts(node[0]) if node else None,
            disk=_disk(*store) if store else None,
            memory=_memory(look.memory) if look.memory else None,
            policies=_policies(look.stats[SCHEDULER]) if SCHEDULER in look.stats else None,
            learning=node[0].now.learning_obstacle if node else "",
            guards=tuple(_guards(node[0].now)) if node else (),
            stalls=_stalls(node[0]) if node else {},
            heat=tuple(_heat(look)),
        )

    def _changes(self, daemon: str) -> tuple[Change, Change] | None:
        """Of the last seconds, and of the last minute. None: it is away."""
        if daemon not in self._looks[-1].stats:
            return None
        return self._change(daemon, RECENT_S), self._change(daemon, MINUTE_S)

    def _change(self, daemon: str, seconds: float) -> Change:
        """Since the oldest look of so long that the daemon answered."""
        now = self._looks[-1]
        young = (one for one in self._looks if now.at_s - one.at_s <= seconds)
        before = next(one for one in young if daemon in one.stats)
        return Change(before.stats[daemon], now.stats[daemon], now.at_s - before.at_s)


@dataclass(frozen=True)
class Change:
    """Of one daemon, between two looks."""

    before: Stats
    now: Stats
    seconds: float

    def rate(self, key: str) -> float | None:
        """Of a counter, a second. None: there is one look, or the daemon was started between."""
        grown = self.grown(key)
        return grown / self.seconds if self.seconds > 0 and grown >= 0 else None

    def grown(self, key: str) -> float:
        return float(self.now.get(key, 0) - self.before.get(key, 0))

    def spread(self, key: str) -> Spread | None:
        """Of a histogram's values; since the daemon's start when there are none between."""
        found: Histogram = getattr(self.now, key)
        latest = found.since(getattr(self.before, key))
        values = latest if latest.num else found
        p50, p95 = values.quantile(0.5), values.quantile(0.95)
        return None if p50 is None or p95 is None else Spread(p50, p95, values.num)


def _speed(recent: Change, minute: Change) -> Speed:
    return Speed(
        recent.rate("generated_tokens"),
        recent.rate("prompt_tokens"),
        minute.spread("first_token_s"),
        minute.spread("between_tokens_s"),
        minute.spread("queued_s"),
    )


def _clients(node: Stats) -> Clients:
    return Clients(
        open=node.open,
        waiting=node.queued,
        total=node.requests,
        failed=node.failed,
        refused=node.refused,
        sequences=node.get("live"),
        kept_hits=node.get("kept_hits"),
        tokens_saved=node.get("tokens_saved"),
    )


def _experts(recent: Change) -> Experts:
    node = recent.now
    return Experts(
        hit_ratio=_ratio(recent.grown("hits"), recent.grown("misses")),
        hit_ratio_ever=_ratio(node.hits, node.misses),
        resident=node.resident,
        slots=node.slots,
    )


def _ratio(hits: float, misses: float) -> float | None:
    """None: nothing was routed, or the daemon was started between two looks."""
    return hits / (hits + misses) if hits + misses > 0 and min(hits, misses) >= 0 else None


def _stalls(recent: Change) -> dict[str, float]:
    """Share of the time, the largest first. What is next to nothing is left out."""
    before, now = recent.before.by("cause"), recent.now.by("cause")
    if recent.seconds <= 0:
        return {}
    shares = {
        cause: (found.stall_cause_s - before[cause].stall_cause_s) / recent.seconds
        for cause, found in now.items()
        if cause in before
    }
    kept = {cause: share for cause, share in shares.items() if share >= 0.005}
    return {
        words.called(words.STALL_CAUSES, cause): share
        for cause, share in sorted(kept.items(), key=lambda one: -one[1])
    }


def _disk(recent: Change, minute: Change) -> Disk:
    busy_share = recent.rate("busy_s")
    return Disk(
        bytes_per_s=recent.rate("bytes_read"),
        busy_share=None if busy_share is None else min(1.0, busy_share),
        read_s=minute.spread("demand_read_s"),
        damaged=recent.now.quarantined_experts,
    )


def _memory(report: MemoryReport) -> Memory:
    parts = {
        words.called(words.MEMORY_PARTS, name): size_bytes
        for name, size_bytes in sorted(report.parts.items(), key=lambda one: -one[1])
    }
    return Memory(
        report.ceiling_bytes, report.current_bytes, report.peak_bytes, parts, report.age_s
    )


def _policies(scheduler: Stats) -> Policies | None:
    """Of the node that was followed most. None: no node was followed yet."""
    nodes = scheduler.by("node")
    if not nodes:
        return None
    node, found = max(nodes.items(), key=lambda one: int(one[1].steps))
    scores = [
        Policy(
            name,
            words.called(words.POLICIES, name),
            score.windowed_hit_ratio,
            None if name == _OPTIMUM else max(0.0, score.windowed_regret),
        )
        for name, score in found.by("policy").items()
        if score.get("hit_ratio") is not None
    ]
    scores.sort(key=lambda score: -score.hit_ratio)
    return Policies(node, found.in_charge, words.reason(found.why), tuple(scores))


def _guards(node: Stats) -> Iterator[Guarded]:
    for budget, guard in node.by("budget").items():
        yield Guarded(
            budget=budget,
            route=guard.quality_route,
            checks=guard.quality_checks,
            kl=guard.quality_kl,
            kl_high=guard.quality_kl_high,
            kl_limit=guard.quality_kl_limit,
            top1=guard.quality_top1,
            tightened=guard.quality_tightened,
            relaxed=guard.quality_relaxed,
        )


def _heat(look: Look) -> Iterator[HeatRow]:
    for layer, states in look.heat.items():
        yield HeatRow(layer, "".join(map(str, states)))
