"""Scores texts: how likely each token was to the model, and from that the perplexity."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from compute_node.client.node_client import NodeClient, Scoring
from compute_node.client.result import ScoredToken
from deploy.terminal.prompts import Prompt
from proto import errors


@dataclass(frozen=True)
class TextScore:
    """The score of all texts together.

    texts: of each, every token that was scored, in order
    token_s: between the arrivals of a text's tokens, text after text
    bytes_read: for them, from the disk
    """

    texts: tuple[tuple[ScoredToken, ...], ...]
    wall_s: float
    bytes_read: int = 0
    token_s: tuple[tuple[float, ...], ...] = ()

    @cached_property
    def scored(self) -> tuple[ScoredToken, ...]:
        """Every token, of all texts."""
        return tuple(chain.from_iterable(self.texts))

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
    """One score's perplexity divided by another's, on the same tokens.

    low, high: the ratio less and plus two standard errors
    worst_text: the ratio of the text that has the highest
    """

    ratio: float
    low: float
    high: float
    worst_text: float

    @classmethod
    def of(cls, score: TextScore, other: TextScore) -> Comparison:
        """Raises InvalidRequest when the two cut the texts into different tokens."""
        if _token_ids(score) != _token_ids(other):
            raise errors.InvalidRequest(
                "the two stores cut the text into different tokens, so their perplexities do not "
                "compare: give stores of one checkpoint"
            )
        texts = [
            [theirs.log_prob - ours.log_prob for ours, theirs in zip(*pair, strict=True)]
            for pair in zip(score.texts, other.texts, strict=True)
        ]
        nats = list(chain.from_iterable(texts))
        mean, error = statistics.fmean(nats), 2 * max(_error(nats), _error_of_texts(texts))
        worst = max(statistics.fmean(text) for text in texts if text)
        return cls(*map(math.exp, (mean, mean - error, mean + error, worst)))


def _token_ids(score: TextScore) -> list[list[int]]:
    return [[token.token_id for token in text] for text in score.texts]


def _error(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return statistics.pstdev(values) / math.sqrt(len(values))


def _error_of_texts(texts: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean over all tokens, where those of one text may err together (a
    cluster sample); 0 of one text, which says nothing of it.
    """
    num_texts, num_tokens = len(texts), sum(map(len, texts))
    if num_texts < 2:
        return 0.0
    mean = math.fsum(map(math.fsum, texts)) / num_tokens
    squares = math.fsum((math.fsum(text) - len(text) * mean) ** 2 for text in texts)
    return math.sqrt(squares * num_texts / (num_texts - 1)) / num_tokens


@dataclass
class TextScorer:
    """Scores texts one after another, on one thread. Another thread may call `cancel`.

    max_tokens: the most tokens of a text; 0: all
    route:      the rules of decode, as `NodeClient.score` takes them
    check_every, quality: the same
    report:     called with the number of tokens of this text that are scored
    """

    node: NodeClient
    max_tokens: int
    context_tokens: int
    route: str = ""
    check_every: int = 0
    quality: str = ""
    report: Callable[[int], None] = lambda num_tokens: None
    _current: Scoring | None = None
    _cancelled: bool = False

    def run(self, wanted: Sequence[Prompt], done: Callable[[int, Prompt], None]) -> TextScore:
        """Score all texts. Calls `done` with the number of each text that is scored.

        Raises Cancelled after `cancel`, and the error that the node ends a text with.
        """
        texts, token_s = list[tuple[ScoredToken, ...]](), list[tuple[float, ...]]()
        start_s, before = time.perf_counter(), self.node.stats().bytes_read
        for number, text in enumerate(wanted):
            scored, times_s = self._score(text)
            texts.append(scored)
            token_s.append(tuple(after - then for then, after in pairwise(times_s)))
            done(number, text)
        bytes_read = int(self.node.stats().bytes_read - before)
        wall_s = time.perf_counter() - start_s
        return TextScore(tuple(texts), wall_s, bytes_read, tuple(token_s))

    def cancel(self) -> None:
        """End the current text and begin no other."""
        self._cancelled = True
        if self._current is not None:
            self._current.cancel()

    def _score(self, text: Prompt) -> tuple[tuple[ScoredToken, ...], list[float]]:
        """The tokens of a text, and when each arrived."""
        self._current = self.node.score(
            text.text,
            max_tokens=self.max_tokens,
            context_tokens=self.context_tokens,
            route=self.route,
            check_every=self.check_every,
            quality=self.quality,
        )
        if self._cancelled:  # between two texts, when there was none to cancel
            self._current.cancel()
        scored, times_s = list[ScoredToken](), list[float]()
        for token in self._current:
            times_s.append(time.perf_counter())
            scored.append(token)
            self.report(len(scored))
        return tuple(scored), times_s
