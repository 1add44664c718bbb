"""What a caller wants generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.grammar import HeldAnswer
from compute_node.evidence.accesses import Recording
from compute_node.moe.route import EXACT, RoutePolicy
from compute_node.quality.guard import Guard
from compute_node.quality.turns import OneRoute, Rung, Turns


@dataclass(frozen=True)
class Request:
    """What to generate from.

    token_ids: the prompt, never empty
    skip_special_tokens: leave them out of the text; else it shows what ends it, too
    recording: what to tell of every decode step; None: nothing
    policy: chooses among the experts of decode steps
    route:  the policy's name
    guard:  says for each decode step what it goes by, in place of the policy
    route_prompts: and of the prompt
    client: whose turn it is, for fair shares
    log_probs: of how many likeliest tokens, at each place; None: not even of the one drawn
    held: to a grammar, before its first token; None: it says what it likes
    """

    token_ids: tuple[int, ...]
    max_tokens: int = 128
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    recording: Recording | None = None
    policy: RoutePolicy = EXACT
    route_prompts: bool = False
    route: str = ""
    guard: Guard | None = None
    client: str = ""
    log_probs: int | None = None
    held: HeldAnswer | None = None

    @property
    def turns(self) -> Turns:
        return self.guard or OneRoute(Rung(self.route, self.policy))

    @property
    def num_tokens(self) -> int:
        """Of the prompt and of the longest answer."""
        return len(self.token_ids) + self.max_tokens
