"""What the planner must know of a model without loading it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizing:
    """What the planner must know of the model without loading it.

    max_position_embeddings: the context it was trained for, rope scaling considered; 0: its config
    sets no limit
    """

    dense_bytes: int
    cache_bytes_per_token: int
    cache_bytes_fixed: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    activated_dense_bytes: int
    eager_attention_heads: int  # 0 where attention never holds a score per pair of positions
