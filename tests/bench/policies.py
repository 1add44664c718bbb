"""Every policy on a trace: hit ratio, and how much of the way from LRU to MIN it goes.

    python -m tests.bench.policies TEST.npz --train TRAIN.npz
    python -m tests.bench.policies TRACE.npz --splits 3

With --splits the trace is split by generation, learned from one part and judged on the other, each
time another way. `make policies` does it for the shipped model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scheduler.lab.lockstep import replay_together
from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Outcome, Setting, gap_closed
from scheduler.simulate.trace import AccessTrace
from tests.bench.table import show, spread

HELD_OUT_RATIO = 0.265

Cell = tuple[str, int, str]  # policy, slots, scope


@dataclass(frozen=True)
class Counts:
    """What every policy hit on one trace, by (policy, slots, scope)."""

    outcomes: Mapping[Cell, Outcome]

    def hit_ratio(self, policy: str, slots: int, scope: str) -> float:
        return self.outcomes[policy, slots, scope].hit_ratio

    def gap_closed(self, policy: str, slots: int, scope: str) -> float:
        own, lru, best = (self.outcomes[name, slots, scope] for name in (policy, "lru", "min"))
        return gap_closed(own, lru, best) or 0.0


def count(
    test: AccessTrace,
    train: AccessTrace | None,
    sizes: Sequence[int],
    scopes: Sequence[str],
    names: Sequence[str],
    warmup_steps: int,
    lag_steps: int,
) -> Counts:
    settings = {
        (slots, scope): Setting(test, slots, scope, warmup_steps, lag_steps)
        for slots in sizes
        for scope in scopes
    }
    background = Background(train)
    outcomes: dict[Cell, Outcome] = {}
    for name in names:
        make = POLICIES[name]
        found = replay_together(list(settings.values()), lambda s, make=make: make(s, background))
        outcomes |= {(name, *key): one for key, one in zip(settings, found, strict=True)}
    return Counts(outcomes)


def splits(trace: AccessTrace, number: int) -> list[tuple[AccessTrace, AccessTrace]]:
    """Pairs to train on and to judge with, of different generations."""
    pairs = []
    for seed in range(number):
        shuffled = np.random.default_rng(seed).permutation(trace.num_generations)
        num_test = round(HELD_OUT_RATIO * trace.num_generations)
        test, train = np.sort(shuffled[:num_test]), np.sort(shuffled[num_test:])
        pairs.append((trace.take(train, "train"), trace.take(test, "test")))
    return pairs


def table(
    title: str,
    counts: Sequence[Counts],
    sizes: Sequence[int],
    scopes: Sequence[str],
    names: Sequence[str],
) -> None:
    rows = []
    for scope in scopes:
        for name in names:
            cells = [name, scope]
            for slots in sizes:
                hits = [100 * one.hit_ratio(name, slots, scope) for one in counts]
                gaps = [one.gap_closed(name, slots, scope) for one in counts]
                cells += [_spread(hits, 1), _spread(gaps, 3)]
            rows.append(cells)
    header = ["policy", "scope"]
    for slots in sizes:
        header += [f"hit % at {slots}", "gap closed"]
    show(title, header, rows)


def _spread(values: Sequence[float], digits: int) -> str:
    return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--splits", type=int, default=0)
    parser.add_argument("--slots", default="8,12,16")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--scopes", default="layer,pool")
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--lag", type=int, default=0)
    given = parser.parse_args()
    sizes = [int(slots) for slots in given.slots.split(",")]
    scopes = given.scopes.split(",")
    names = [name for name in POLICIES if name in {*given.policies.split(","), "lru", "min"}]
    trace = AccessTrace.load(given.trace)
    train = AccessTrace.load(given.train) if given.train else None
    pairs = splits(trace, given.splits) if given.splits else [(train, trace)]
    counts = [
        count(test, known, sizes, scopes, names, given.warmup, given.lag) for known, test in pairs
    ]
    how = f"{given.splits} splits by generation, median (min-max)" if given.splits else "one split"
    title = f"{trace.name}: {how}, warm-up {given.warmup} steps, advice {given.lag} steps old"
    table(title, counts, sizes, scopes, names)


if __name__ == "__main__":
    main()
