"""One sequence under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compute_node.moe.route import EXACT, RoutePolicy
from compute_node.moe.step import Phase
from proto.checkpoint.sequence_state import state_bytes


@dataclass
class SequenceState:
    """What is known of it.

    cache: transformers' own, for this model class; None before the first chunk
    policy: chooses among the experts of its decode steps
    routes_prompt: and of its prompt
    prompt_route: the name of what its prompt goes by; empty: exact
    num_reused: of its tokens, whose state was kept from another sequence
    logits: of its prompt's last position, [1, V]; None: not there yet
    """

    name: str
    token_ids: list[int]
    num_computed: int = 0
    cache: Any = None
    policy: RoutePolicy = EXACT
    routes_prompt: bool = False
    prompt_route: str = ""
    num_reused: int = 0
    logits: Tensor | None = None

    def policy_of(self, phase: Phase) -> RoutePolicy:
        return self.policy if self.routes_prompt or phase is Phase.DECODE else EXACT

    @property
    def cache_bytes(self) -> int:
        return state_bytes(self.cache)
