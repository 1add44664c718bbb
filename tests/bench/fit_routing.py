"""Fits the routing that `flashmoe simulate` draws to a recorded trace: hit ratios of LRU and
decayed frequency at several cache sizes, on some generations; judged on others, and other traces.

    python -m tests.bench.fit_routing gpt-oss-20b-decode.npz tests/traces/tiny-moe-decode.npz
"""

from __future__ import annotations

import argparse
from dataclasses import astuple
from pathlib import Path

import numpy as np

from deploy.simulator.routing import Scores
from scheduler.policy.decayed import Decayed
from scheduler.policy.lru import Lru
from scheduler.simulate.ranking import RankingPolicy
from scheduler.simulate.replay import Setting, ranked, replay
from scheduler.simulate.trace import AccessTrace
from tests.bench.table import show

SHARES = (0.1875, 0.25, 0.375, 0.5, 0.75)  # of the experts, in memory
TOKENS, WARMUP = 2100, 300
TRIALS = 40


def ratios(trace: AccessTrace) -> np.ndarray:
    """[policy, share], hit ratios, slots divided by layer."""
    policies: tuple[type[RankingPolicy], ...] = (Lru, Decayed)
    return np.array([[_ratio(trace, policy, share) for share in SHARES] for policy in policies])


def _ratio(trace: AccessTrace, policy: type[RankingPolicy], share: float) -> float:
    setting = Setting(trace, round(share * trace.num_experts), warmup_steps=WARMUP)
    return replay(setting, ranked(setting, policy(trace.shape))).hit_ratio


def part(trace: AccessTrace, first: int, every: int = 2) -> AccessTrace:
    """Some generations, as many tokens as are drawn."""
    taken = trace.take(np.arange(first, trace.num_generations, every), trace.name)
    num = min(TOKENS, taken.num_steps)
    return AccessTrace(
        trace.name,
        taken.topk_ids[:num],
        np.array([*taken.seq_offsets[taken.seq_offsets < num], num]),
        trace.num_experts,
        taken.topk_weights[:num],
    )


def drawn(scores: Scores, like: AccessTrace, seed: int) -> np.ndarray:
    return ratios(scores.draw(like.shape, like.top_k, like.num_steps, seed))


def fit(trace: AccessTrace) -> Scores:
    """By random steps from the best so far, ever smaller."""
    wanted, draws = ratios(trace), np.random.default_rng(0)
    best, least = Scores(0.5, 1.0, 0.8, 3.5), float("inf")
    for trial in range(TRIALS):
        width = 0.3 * (1 - trial / TRIALS) + 0.02
        tried = Scores(*(v * float(np.exp(width * draws.standard_normal())) for v in astuple(best)))
        tried = best if trial == 0 else tried
        error = float(np.abs(drawn(tried, trace, seed=1) - wanted).mean())
        if error < least:
            best, least = tried, error
            print(f"{trial}: {100 * least:.2f} points off, {best}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    given = parser.parse_args()
    trace = AccessTrace.load(given.trace)
    found = fit(part(trace, 0, 8))
    print(found)
    judged = [part(trace, 4, 8), *(part(AccessTrace.load(path), 0, 1) for path in given.others)]
    rows = []
    for one in judged:
        measured, said = ratios(one), drawn(found, one, seed=2)
        for name, real, model in zip(("lru", "decayed"), measured, said, strict=True):
            rows.append(
                [
                    one.name,
                    name,
                    *(f"{100 * a:.1f} / {100 * b:.1f}" for a, b in zip(real, model, strict=True)),
                ]
            )
        print(f"{one.name}: {100 * np.abs(measured - said).max():.1f} points at most")
    show("Hit %, recorded / drawn, by share of the experts", ["trace", "policy", *SHARES], rows)


if __name__ == "__main__":
    main()
