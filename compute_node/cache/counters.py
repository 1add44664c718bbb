"""What the cache counts, by layer."""

from __future__ import annotations

from dataclasses import dataclass

from proto.stats import counter

_ACCESSES, _BY_OUTCOME = "flashmoe_node_accesses", "Routed experts by outcome"


@dataclass
class LayerCounters:
    """Of one layer, since start. A miss that another node's copy answers reads 0 bytes.

    stall_s:     waiting for experts
    uncovered_s: what reading the misses that nobody guessed takes beyond the layer's own compute
    """

    hits: int = counter(_ACCESSES, _BY_OUTCOME, outcome="hit")
    misses: int = counter(_ACCESSES, _BY_OUTCOME, outcome="miss")
    bytes_read: int = counter("flashmoe_node_read_bytes", "Bytes its misses read from disk")
    stall_s: float = counter("flashmoe_node_stall_seconds", "Compute waited for experts", start=0.0)
    uncovered_s: float = 0.0
