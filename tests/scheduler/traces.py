"""Small hand-made evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from proto.access import DecodeAccess, PrefillAccess
from proto.redis_schema import Fields
from scheduler.config import SchedulerConfig

FINGERPRINT = "f00d"


def small_config(**changes: Any) -> SchedulerConfig:
    """Two MoE layers (the model's 1 and 3) of eight experts."""
    settings: dict[str, Any] = {
        "address": "unix:unused.sock",
        "redis_url": "unix:///unused.sock",
        "fingerprint": FINGERPRINT,
        "moe_layers": (1, 3),
        "num_experts": 8,
        "horizon_steps": 4,
        "read_block_s": 0.02,
        "reconnect_max_s": 0.05,
    }
    return SchedulerConfig(**{**settings, **changes})


def decode_step(
    ids: Sequence[Sequence[int]],
    *,
    step: int = 0,
    node: str = "node-a",
    weights: float = 0.5,
    num_experts: int = 8,
    sequence: str = "s",
    slots: int = 4,
    scope: str = "layer",
    time_ns: int = 1,
) -> DecodeAccess:
    topk_ids = np.asarray(ids, np.uint16)
    return DecodeAccess(
        node=node,
        sequence=sequence,
        step=step,
        num_experts=num_experts,
        slots=slots,
        scope=scope,
        policy="lru",
        time_ns=time_ns,
        topk_ids=topk_ids,
        topk_weights=np.full(topk_ids.shape, weights, np.float16),
        hits=np.zeros(topk_ids.shape, np.bool_),
    )


def prefill(counts: Any, num_tokens: int) -> PrefillAccess:
    return PrefillAccess("node-a", "s", num_tokens, 1, np.asarray(counts, np.uint32))


def structured_trace(num_steps: int, seed: int = 0) -> Iterator[DecodeAccess]:
    """Bursts: each layer keeps two experts for eleven steps, then draws two others."""
    random = np.random.default_rng(seed)
    for step in range(num_steps):
        if step % 11 == 0:
            ids = [random.choice(8, 2, replace=False) for _ in range(2)]
        yield decode_step([layer.tolist() for layer in ids], step=step)


def on_the_wire(fields: Fields) -> dict[bytes, bytes]:
    """Fields as a reader gets them back from Redis."""
    return {
        str(name).encode(): value if isinstance(value, bytes) else str(value).encode()
        for name, value in fields.items()
    }
