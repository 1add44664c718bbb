"""Several clients at once against the same texts one after another."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from tests.bench.clients.engines import Running, at_once, running
from tests.bench.peers.laboratory import read_prompts
from tests.bench.peers.run import Prompt
from tests.bench.table import machine, show, spread

PROMPT_TOKENS = 48


@dataclass
class Answer:
    """at_s: when each token came, on time.monotonic"""

    began_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Together:
    """What a number of clients got, and what it cost. answers: one a client"""

    answers: list[Answer]
    bytes_read: int

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def wall_s(self) -> float:
        return max(a.at_s[-1] for a in self.answers) - min(a.began_s for a in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s

    @property
    def fairness(self) -> float:
        """Tokens of the slowest over the mean, until the first is through."""
        end_s = min(answer.at_s[-1] for answer in self.answers)
        served = [sum(at_s <= end_s for at_s in answer.at_s) for answer in self.answers]
        return min(served) / statistics.fmean(served)


def together(chosen: argparse.Namespace) -> None:
    """Rounds of `chosen.clients` clients, one after another and at once, in turn."""
    print(machine())
    rows = [
        row
        for engine in chosen.engines
        for share in chosen.shares
        for clients in chosen.clients
        for row in _rows(chosen, engine, share, clients)
    ]
    show(
        f"Clients at once over the same texts one after another, {chosen.tokens} tokens each",
        ["engine", "share", "clients", "alone /s", "tokens/s", "bytes", "slowest/mean", "same"],
        rows,
    )


def _rows(
    chosen: argparse.Namespace, name: str, share: float | None, clients: int
) -> Iterator[list[str]]:
    prompts = read_prompts(PROMPT_TOKENS)[:clients]
    rates, reads, fair, alone, same = [], [], [], [], True
    with running(chosen.python, name, share, clients) as one:
        _round(one, prompts[:1], 16, seed=99, at_a_time=1)  # not cold
        for number in range(chosen.rounds):
            pair: dict[int, Together] = {}
            for width in (1, clients) if number % 2 == 0 else (clients, 1):
                pair[width] = _round(one, prompts, chosen.tokens, 100 * number, width)
            rates.append(pair[clients].tokens_per_s / pair[1].tokens_per_s)
            reads.append(pair[clients].bytes_read / max(1, pair[1].bytes_read))
            fair.append(pair[clients].fairness)
            alone.append(pair[1].tokens_per_s)
            texts = [[a.token_ids for a in pair[width].answers] for width in (1, clients)]
            same = same and texts[0] == texts[1]
            print(f"{name} {share} {clients}: {rates[-1]:.3f} {reads[-1]:.3f} {fair[-1]:.2f}")
    limit = "none" if share is None else f"{share:g} %"
    figures = [spread(alone), spread(rates, 2), spread(reads, 2), spread(fair, 2)]
    yield [name, limit, str(clients), *figures, str(same)]


def _round(one: Running, prompts: list[Prompt], tokens: int, seed: int, at_a_time: int) -> Together:
    answers = [Answer() for _ in prompts]
    before, _ = one.counters.read()
    asks = [
        partial(_ask, one, prompt, tokens, seed + number, answers[number])
        for number, prompt in enumerate(prompts)
    ]
    for start in range(0, len(asks), at_a_time):
        at_once(asks[start : start + at_a_time])
    after, _ = one.counters.read()
    return Together(answers, after - before)


def _ask(one: Running, prompt: Prompt, tokens: int, seed: int, answer: Answer) -> None:
    answer.began_s = time.monotonic()
    for token in one.engine.generate(prompt.token_ids, tokens, seed):
        answer.token_ids.append(token.token_id)
        answer.at_s.append(token.at_s)
