"""How likely a text is to the model, token by token, by the very passes that decode makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from compute_node.client.result import ScoredToken
from compute_node.engine.engine import Engine
from compute_node.engine.request import Request
from compute_node.engine.seat import Seat
from compute_node.engine.sequence import SequenceState
from compute_node.moe.step import Phase
from compute_node.quality.turns import OneRoute, Rung, Turns
from proto import errors

_numbers = itertools.count(1)


@dataclass(frozen=True)
class ScoredText:
    """A text longer than `context_tokens` is scored in parts, each from its own start."""

    token_ids: tuple[int, ...]
    context_tokens: int

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """A last token that stands alone is left out: nothing comes before it."""
        starts = range(0, len(self.token_ids) - 1, self.context_tokens)
        return [self.token_ids[start : start + self.context_tokens] for start in starts]


def check_text(engine: Engine, text: ScoredText) -> None:
    """Raises InvalidRequest for less than two tokens, parts longer than the context, or token ids
    that the model does not have.
    """
    if len(text.token_ids) < 2 or text.context_tokens < 2:
        raise errors.InvalidRequest("there is nothing to score: give at least two tokens")
    for part in text.parts:
        engine.limits.check(Request(part[:-1], max_tokens=1))
        engine.limits.check(Request(part[-1:], max_tokens=1))


def score(
    engine: Engine,
    text: ScoredText,
    turns: Turns | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[ScoredToken]:
    """Every token of the text but the first of each part. `check` may raise between layers.

    turns: what each token is computed with, and whether it is compared with exact logits, on the
    same prefix and state; not where the model cannot compute these, see ExactPass. None: exact
    Raises what `check_text` and Engine.generate raise.
    """
    check_text(engine, text)
    seat = Seat(check)
    lossy = engine.lossy_decode(turns or OneRoute(Rung()))
    for part in text.parts:
        sequence = SequenceState(f"score{next(_numbers)}", [])
        for token_id, following in itertools.pairwise(part):
            sequence.token_ids.append(token_id)
            forward = partial(engine.forward, sequence, [token_id], Phase.DECODE, seat)
            logits, _ = lossy.step(sequence, forward, check)  # [1, V]
            log_prob = float(logits[0].double().log_softmax(dim=-1)[following])
            found = lossy.latest
            if found is None:
                yield ScoredToken(following, log_prob)
            else:
                yield ScoredToken(following, log_prob, found.kl, found.agrees)
