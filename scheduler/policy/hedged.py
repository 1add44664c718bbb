"""Puts that policy in charge which would have kept more, and follows turns only while that pays.

All members run beside the real stream, so what each would have hit is known, not estimated: the
leader is followed. A scout goes over to a challenger once that has gained enough hits on its
choice since it last fell behind. Yet a stream can turn whenever the scout has: then some member
alone does better than the scout over the long run, which is seen in the same way, and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess
from scheduler.simulate.replay import RankedCache
from scheduler.simulate.slots import Hits, Slots

LEAD_STEPS = 2.0  # what the scout wants to see gained, in the accesses of this many steps
LONG_RUN_STEPS = 2048  # half-life of what tells a member from the scout ...
LONG_RUN_LEAD_STEPS = 1.0  # ... and by how much

FIRST, LED, STEADY, PINNED = "first", "led", "steady", "pinned"


@dataclass(frozen=True)
class Reason:
    """Why a policy is in charge.

    kind:       FIRST, no other has led yet; LED, it led of late; STEADY, it led over the long run,
                as the scout's changes did not pay; PINNED, by configuration
    over:       whom it took over from; empty otherwise
    lead_ratio: its hit ratio less the other's, over the steps in which it gathered its lead
    lead_steps: how many those were
    at_step:    after how many steps it was put in charge
    """

    kind: str
    over: str = ""
    lead_ratio: float = 0.0
    lead_steps: int = 0
    at_step: int = 0

    def __str__(self) -> str:
        if self.kind in (LED, STEADY):
            when = "of late" if self.kind == LED else "over the long run"
            points = f"{100 * self.lead_ratio:.2f} points in {self.lead_steps} steps"
            return f"led {self.over} {when}, by {points}, at step {self.at_step}"
        return {FIRST: "no other has led it yet", PINNED: "configured"}[self.kind]


class Scout:
    """Goes over to the member that has gained LEAD_STEPS on its choice. size: how many there are.

    choice: a number below size
    """

    def __init__(self, size: int) -> None:
        self.choice = 0
        self._gains = np.zeros(size)  # of each on the choice, never below 0
        self._gaining_steps = np.zeros(size, np.int64)

    def observe(self, ratios: NDArray[np.float64]) -> tuple[float, int] | None:
        """[size], one more step. Returns, when it changes its choice, the lead in hit ratio and in
        how many steps it was gathered.
        """
        self._gains = np.maximum(0.0, self._gains + ratios - ratios[self.choice])
        self._gaining_steps = np.where(self._gains > 0, self._gaining_steps + 1, 0)
        leader = int(self._gains.argmax())
        if self._gains[leader] <= LEAD_STEPS:
            return None
        steps = int(self._gaining_steps[leader])
        lead = float(self._gains[leader]) / steps
        self.choice = leader
        self._gains[:] = 0
        self._gaining_steps[:] = 0
        return lead, steps


class Hedge:
    """Decides who is in charge. names: simplest first, which begins and takes every tie."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._scout = Scout(len(names))
        self._scouts_lead: tuple[float, int] = (0.0, 0)  # when the scout last went over
        self._followed = len(names)  # a member, or after them the scout
        self._gathered = np.zeros(len(names) + 1)  # hits of each and the scout, in steps, decayed
        self._keep = 0.5 ** (1 / LONG_RUN_STEPS)
        self._num_steps = 0
        self._in_charge = 0
        self.num_switches = 0
        self.reason = Reason(FIRST)

    @property
    def in_charge(self) -> str:
        return self._names[self._in_charge]

    def observe(self, hit_ratios: Mapping[str, float]) -> None:
        """What each member hit in one more step, as a share of its accesses."""
        ratios = np.array([hit_ratios[name] for name in self._names])
        self._num_steps += 1
        self._gathered *= self._keep
        self._gathered += np.append(ratios, ratios[self._scout.choice])
        self._scouts_lead = self._scout.observe(ratios) or self._scouts_lead
        leader = int(self._gathered.argmax())
        if self._gathered[leader] > self._gathered[self._followed] + LONG_RUN_LEAD_STEPS:
            self._followed = leader
        follows_scout = self._followed == len(self._names)
        choice = self._scout.choice if follows_scout else self._followed
        if choice != self._in_charge:
            self._switch(
                choice, self._scouts_lead if follows_scout else self._long_run_lead(choice)
            )

    def _long_run_lead(self, choice: int) -> tuple[float, int]:
        steps = (1 - self._keep**self._num_steps) / (1 - self._keep)
        lead = self._gathered[choice] - self._gathered[self._in_charge]
        return float(lead / steps), round(steps)

    def _switch(self, choice: int, lead: tuple[float, int]) -> None:
        kind = LED if self._followed == len(self._names) else STEADY
        self.reason = Reason(kind, self.in_charge, *lead, self._num_steps)
        self._in_charge = choice
        self.num_switches += 1


class Hedged:
    """Slots whose evictions go by the ranks of the member in charge, lag and all.

    members: by name, simplest first, each over slots of its own under the same budget
    """

    def __init__(self, members: Mapping[str, RankedCache], slots: Slots) -> None:
        self.members = members
        self._slots = slots
        self.hedge = Hedge(list(members))

    def step(self, event: DecodeAccess) -> Hits:
        """Who decides in a step was put in charge before it."""
        in_charge = self.members[self.hedge.in_charge]
        ratios = {name: hit_ratio(member.step(event)) for name, member in self.members.items()}
        hits = self._slots.step(event.topk_ids, in_charge.before, in_charge.after)
        self.hedge.observe(ratios)
        return hits


def hit_ratio(hits: NDArray[np.bool_]) -> float:
    """Of one step, [L, K]."""
    return float(np.count_nonzero(hits) / hits.size)
