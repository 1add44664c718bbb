"""How likely a text is to the model, token by token, by the very passes that decode makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compute_node.client.result import ScoredToken
from compute_node.engine.engine import Engine
from compute_node.engine.request import Request
from compute_node.engine.sequence import SequenceState
from compute_node.moe.route import EXACT, RoutePolicy
from compute_node.quality.divergence import Divergence
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
    policy: RoutePolicy = EXACT,
    check_every: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[ScoredToken]:
    """Every token of the text but the first of each part. `check` may raise between layers.

    check_every: the last of this many tokens is compared with exact logits, on the same prefix and
    state; 0: none. Not where the model cannot compute it, see ExactPass.
    Raises what `check_text` and Engine.generate raise.
    """
    check_text(engine, text)
    tokens = itertools.count(1)
    for part in text.parts:
        sequence = SequenceState(f"score{next(_numbers)}", [], policy=policy)
        for token_id, following in itertools.pairwise(part):
            sequence.token_ids.append(token_id)
            is_checked = check_every > 0 and next(tokens) % check_every == 0
            exact = engine.exact_pass.logits(sequence, check) if is_checked else None
            (logits,) = engine.decode([sequence], check)  # [1, V]
            log_prob = float(logits[0].double().log_softmax(dim=-1)[following])
            if exact is None:
                yield ScoredToken(following, log_prob)
                continue
            found = Divergence.of(exact, logits)
            yield ScoredToken(following, log_prob, found.kl, found.agrees)
