"""Decodes a sequence by the turns that somebody gives it, and compares some of its tokens with
exact ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from compute_node.engine.exact_pass import ExactPass
from compute_node.engine.sequence import SequenceState
from compute_node.engine.usage import Usage
from compute_node.moe.route import is_exact
from compute_node.moe.step import Step
from compute_node.quality.divergence import Divergence
from compute_node.quality.turns import Turns
from proto.stats import counter

Forward = Callable[[], tuple[Tensor, Step]]
_CHANGED, _HELP = "flashmoe_node_lossy_experts", "Experts chosen by routers that decode changed"


@dataclass
class LossyCounts:
    """Of one node, since its start."""

    tokens: int = counter(
        "flashmoe_node_lossy_tokens", "Tokens decoded by a lossy route", key="lossy_tokens"
    )
    substituted: int = counter(_CHANGED, _HELP, key="lossy_substituted", how="substituted")
    skipped: int = counter(_CHANGED, _HELP, key="lossy_skipped", how="skipped")
    small: int = counter(_CHANGED, _HELP, key="lossy_small", how="small")

    def count(self, step: Step) -> None:
        self.tokens += not is_exact(step.policy)
        self.substituted += step.num_substituted
        self.skipped += step.num_skipped
        self.small += step.num_small


@dataclass
class LossyDecode:
    """Of one request.

    counts: of the node
    usage:  hears of what routes left out, and of checks
    routes: tokens by route
    latest: what the check of the latest token found; None: it was not checked
    """

    turns: Turns
    exact_pass: ExactPass
    counts: LossyCounts
    usage: Usage = field(default_factory=Usage)
    routes: Counter[str] = field(default_factory=Counter)
    latest: Divergence | None = None

    def step(
        self, sequence: SequenceState, forward: Forward, check: Callable[[], None]
    ) -> tuple[Tensor, Step]:
        """What `forward` returns, which computes the sequence's latest token by its policy. Raises
        what it raises, and what ExactPass.logits raises.
        """
        turn = self.turns.next()
        exact = self._exact(sequence, check) if turn.is_checked else None
        sequence.policy = turn.rung.policy
        logits, step = forward()
        self.routes[turn.rung.route] += 1
        self.usage.count(step)
        self.counts.count(step)
        self.latest = None
        if exact is not None:
            self.usage.checks += 1
            self.latest = Divergence.of(exact, logits)
            self.turns.heard(turn, self.latest)
        return logits, step

    def _exact(self, sequence: SequenceState, check: Callable[[], None]) -> Tensor | None:
        start_s, before = time.perf_counter(), self.exact_pass.loans.bytes_read
        try:
            return self.exact_pass.logits(sequence, check)
        finally:
            self.usage.check_s += time.perf_counter() - start_s
            self.usage.check_bytes += self.exact_pass.loans.bytes_read - before
