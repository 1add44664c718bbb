"""Scores texts: how likely each token was to the model, and from that the perplexity."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compute_node.client.node_client import NodeClient, Scoring
from compute_node.client.result import ScoredToken
from deploy.terminal.prompts import Prompt
from proto import errors


@dataclass(frozen=True)
class TextScore:
    """The score of all texts together.

    scored: every token that was scored, in order
    bytes_read: for them, from the disk
    """

    scored: tuple[ScoredToken, ...]
    wall_s: float
    bytes_read: int = 0

    @property
    def nats_per_token(self) -> float:
        return -statistics.fmean(token.log_prob for token in self.scored)

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / len(self.scored)

    @property
    def tokens_per_s(self) -> float:
        return len(self.scored) / self.wall_s


@dataclass(frozen=True)
class Comparison:
    """One store's perplexity divided by another's, on the same tokens.

    low, high: the ratio less and plus two standard errors
    """

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, score: TextScore, other: TextScore) -> Comparison:
        """Raises InvalidRequest when the two cut the texts into different tokens."""
        pairs = list(zip(score.scored, other.scored, strict=False))
        same_ids = all(a.token_id == b.token_id for a, b in pairs)
        if len(score.scored) != len(other.scored) or not same_ids:
            raise errors.InvalidRequest(
                "the two stores cut the text into different tokens, so their perplexities do not "
                "compare: give stores of one checkpoint"
            )
        nats = [b.log_prob - a.log_prob for a, b in pairs]
        mean, spread = statistics.fmean(nats), statistics.pstdev(nats)
        error = 2 * spread / math.sqrt(len(nats))
        return cls(math.exp(mean), math.exp(mean - error), math.exp(mean + error))


@dataclass
class TextScorer:
    """Scores texts one after another, on one thread. Another thread may call `cancel`.

    max_tokens: the most tokens of a text; 0: all
    route:      the rules of decode, as `NodeClient.score` takes them
    report:     called with the number of tokens of this text that are scored
    """

    node: NodeClient
    max_tokens: int
    context_tokens: int
    route: str = ""
    report: Callable[[int], None] = lambda num_tokens: None
    _current: Scoring | None = None
    _cancelled: bool = False

    def run(self, texts: Sequence[Prompt], done: Callable[[int, Prompt], None]) -> TextScore:
        """Score all texts. Calls `done` with the number of each text that is scored.

        Raises Cancelled after `cancel`, and the error that the node ends a text with.
        """
        scored: list[ScoredToken] = []
        start_s, before = time.perf_counter(), self.node.stats().bytes_read
        for number, text in enumerate(texts):
            scored += self._score(text)
            done(number, text)
        bytes_read = int(self.node.stats().bytes_read - before)
        return TextScore(tuple(scored), time.perf_counter() - start_s, bytes_read)

    def cancel(self) -> None:
        """End the current text and begin no other."""
        self._cancelled = True
        if self._current is not None:
            self._current.cancel()

    def _score(self, text: Prompt) -> list[ScoredToken]:
        self._current = self.node.score(
            text.text,
            max_tokens=self.max_tokens,
            context_tokens=self.context_tokens,
            route=self.route,
        )
        if self._cancelled:  # between two texts, when there was none to cancel
            self._current.cancel()
        scored = []
        for token in self._current:
            scored.append(token)
            self.report(len(scored))
        return scored
