"""Small access traces, and what a policy misses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Setting, replay
from scheduler.simulate.trace import AccessTrace

PATH = Path(__file__).resolve().parent.parent / "traces" / "tiny-moe-decode.npz"


def recorded() -> AccessTrace:
    """360 steps of 8 layers, 4 of 32 experts, recorded from the shipped model."""
    return AccessTrace.load(PATH)


def scored() -> AccessTrace:
    """180 steps of 8 layers, 4 of 32 experts, with router scores, from the shipped model."""
    return AccessTrace.load(PATH.with_name("tiny-moe-scored.npz"))


def trace_of(
    steps: Sequence[Sequence[Sequence[int]]],
    num_experts: int,
    seq_offsets: Sequence[int] | None = None,
) -> AccessTrace:
    """steps: [T, L, K]"""
    topk_ids = np.array(steps, np.uint16)
    return AccessTrace(
        name="small",
        topk_ids=topk_ids,
        seq_offsets=np.array(seq_offsets or [0, len(topk_ids)], np.int64),
        num_experts=num_experts,
        topk_weights=np.full(topk_ids.shape, 0.5, np.float16),
    )


def traces(
    max_layers: int = 3, max_experts: int = 6, max_top_k: int = 3, max_steps: int = 12
) -> st.SearchStrategy[AccessTrace]:
    """With fewer experts a token than a layer has, and scores that have nothing to do with them."""

    @st.composite
    def draw_trace(draw: st.DrawFn) -> AccessTrace:
        num_layers = draw(st.integers(1, max_layers))
        top_k = draw(st.integers(1, max_top_k))
        num_experts = draw(st.integers(top_k + 1, max_experts))
        experts = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
        layers = st.lists(experts, min_size=num_layers, max_size=num_layers)
        trace = trace_of(draw(st.lists(layers, min_size=1, max_size=max_steps)), num_experts)
        scores = np.random.default_rng(0).standard_normal((trace.num_steps, *trace.shape))
        return replace(trace, router_scores=scores.astype(np.float16))

    return draw_trace()


def misses(
    policy: str, trace: AccessTrace, slots: int, scope: str = "layer", warmup_steps: int = 0
) -> int:
    setting = Setting(trace, slots, scope, warmup_steps)
    return replay(setting, POLICIES[policy](setting, Background())).misses
