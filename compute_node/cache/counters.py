"""What the cache counts, by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from proto.stats import counter

_ACCESSES, _BY_OUTCOME = "flashmoe_node_accesses", "Routed experts by outcome"


@dataclass
class LayerCounters:
    """Of one layer, since start. A miss that another node's copy answers reads 0 bytes.

    stall_s:     waiting for experts
    uncovered_s: what reading the misses that nobody guessed takes beyond the layer's own compute
    """

    hits: Annotated[int, counter(_ACCESSES, _BY_OUTCOME, outcome="hit")] = 0
    misses: Annotated[int, counter(_ACCESSES, _BY_OUTCOME, outcome="miss")] = 0
    bytes_read: Annotated[
        int, counter("flashmoe_node_read_bytes", "Bytes its misses read from disk")
    ] = 0
    stall_s: Annotated[
        float, counter("flashmoe_node_stall_seconds", "Compute waited for experts")
    ] = 0.0
    uncovered_s: float = 0.0
