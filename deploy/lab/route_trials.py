"""Tries routes one after another on one node: what each costs in quality, bytes and time, beside
the router's own choice of experts in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from compute_node.client.node_client import NodeClient
from deploy.lab.perplexity import Comparison, TextScore, TextScorer
from deploy.terminal.prompts import Prompt
from proto.quality import EXACT_NAME, Setting

CHECKED_PASSAGES, CHECK_EVERY = 2, 2  # every second passage, and of it every second token
CHARACTERS_PER_TOKEN = 12  # no text has more on average; the node cuts what is too long
_LEAST_CHARACTERS = 48


def cut(texts: Sequence[Prompt], num_passages: int, passage_tokens: int) -> list[Prompt]:
    """Passages to score, spread over all texts, at most as many of one text as of another; fewer
    where the texts are short.
    """
    size = CHARACTERS_PER_TOKEN * passage_tokens
    piles = [_pieces(text, size) for text in texts]
    rounds = max(map(len, piles), default=0)
    turns = [pile[turn] for turn in range(rounds) for pile in piles if turn < len(pile)]
    first = turns[: len(texts)]
    if num_passages < len(first):  # not only of the first texts: they may be of one kind
        picked = np.linspace(0, len(first) - 1, num_passages).round().astype(int)
        return [first[number] for number in picked]
    return turns[:num_passages]


def _pieces(text: Prompt, size: int) -> list[Prompt]:
    """From its start, one after another; what is left at the end only where there is no other."""
    starts = range(0, len(text.text), size)
    pieces = [text.text[start : start + size] for start in starts]
    long = [piece for piece in pieces if len(piece.strip()) >= _LEAST_CHARACTERS]
    return [Prompt(text.name, piece) for piece in long or pieces[:1]]


@dataclass(frozen=True)
class Trial:
    """One route on all passages.

    checks: of each token that was computed exactly, too: KL in nats, and whether both find the same
            token likeliest; none of exact, nor where the node cannot check
    """

    route: str
    score: TextScore
    checks: tuple[tuple[float, bool], ...] = ()

    @property
    def kl(self) -> float | None:
        """Mean nats a token."""
        if not self.route:
            return 0.0
        return max(0.0, statistics.fmean(kl for kl, _ in self.checks)) if self.checks else None

    @property
    def top1(self) -> float | None:
        if not self.route:
            return 1.0
        return statistics.fmean(agrees for _, agrees in self.checks) if self.checks else None

    @property
    def token_s(self) -> list[float]:
        return list(chain.from_iterable(self.score.token_s))

    def slowness(self, exact: Trial) -> float:
        """Time a token over exact's: the median of the passages' ratios, which a hiccup of the
        machine changes least.
        """
        pairs = zip(self.score.token_s, exact.score.token_s, strict=True)
        return statistics.median(sum(ours) / sum(theirs) for ours, theirs in pairs if ours)


@dataclass
class RouteTrials:
    """On one thread; another may call `cancel`. Every trial begins from the same cache: that of the
    first passage, routed exactly.

    passages:       what is scored
    passage_tokens: the most of each
    report:         hears of the number of passages of this trial that are scored
    """

    node: NodeClient
    passages: Sequence[Prompt]
    passage_tokens: int
    report: Callable[[int], None] = lambda num_passages: None
    _scorers: list[TextScorer] = field(default_factory=list)
    _cancelled: bool = False

    def run(self, route: str) -> Trial:
        """Raises Cancelled after `cancel`, InvalidRequest for a route that is none, and the error
        that the node ends a passage with.
        """
        self._score("", self.passages[:1])
        score = self._score(route, self.passages, report=self.report)
        return Trial(route, score, self._check(route) if route else ())

    def _check(self, route: str) -> tuple[tuple[float, bool], ...]:
        """In a pass of its own: what is computed exactly, too, is in memory afterwards."""
        checked = self._score(route, self.passages[::CHECKED_PASSAGES], CHECK_EVERY)
        return tuple(
            (token.kl, bool(token.agrees)) for token in checked.scored if token.kl is not None
        )

    def cancel(self) -> None:
        """End the current trial and begin no other."""
        self._cancelled = True
        for scorer in list(self._scorers):
            scorer.cancel()

    def _score(
        self,
        route: str,
        passages: Sequence[Prompt],
        check_every: int = 0,
        report: Callable[[int], None] = lambda num_passages: None,
    ) -> TextScore:
        """An empty route stands for what the node does unasked, so exact is asked for by name."""
        tokens = self.passage_tokens
        scorer = TextScorer(self.node, tokens, tokens, route or EXACT_NAME, check_every)
        self._scorers = [scorer]
        if self._cancelled:  # between two trials, when there was none to cancel
            scorer.cancel()
        return scorer.run(passages, lambda number, passage: report(number + 1))


def setting_of(trial: Trial, nearest: Trial, exact: Sequence[Trial]) -> Setting:
    """What a route costs and brings.

    nearest: exact as it ran last before the trial: times are compared with it
    exact:   every run of exact, whose mean speed and bytes stand for it
    """
    mean_s = statistics.fmean(chain.from_iterable(one.token_s for one in exact))
    exact_bytes = statistics.fmean(one.score.bytes_per_token for one in exact)
    found = Comparison.of(trial.score, nearest.score)
    bytes_per_token = trial.score.bytes_per_token if trial.route else exact_bytes
    times_ms = np.array(trial.token_s) * 1e3
    return Setting(
        route=trial.route,
        perplexity=found.ratio,
        perplexity_low=found.low,
        perplexity_high=found.high,
        worst_text=found.worst_text,
        kl=trial.kl,
        top1=trial.top1,
        bytes_ratio=bytes_per_token / exact_bytes if exact_bytes else 1.0,
        bytes_per_token=bytes_per_token,
        tokens_per_s=1 / (mean_s * trial.slowness(nearest)),
        token_ms_p50=float(np.percentile(times_ms, 50)),
        token_ms_p95=float(np.percentile(times_ms, 95)),
    )
