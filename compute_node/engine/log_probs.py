"""How likely a token was, and what else was likely at its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MAX_LIKELIEST = 20  # as OpenAI has it


@dataclass(frozen=True)
class LogProb:
    """text: of this token alone; log_prob: natural logarithm"""

    token_id: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class LogProbs:
    """Of one place. likeliest: the likeliest first, the one drawn may be among them"""

    drawn: LogProb
    likeliest: tuple[LogProb, ...]


def log_probs_of(
    tokenizer: Any, before: Sequence[int], logits: Tensor, drawn: int, num_likeliest: int
) -> LogProbs:
    """By the model's logits as they are, whatever the sampling, and whatever a grammar bars.

    before: what it follows; logits: [1, V]
    """
    all_of_them = logits[0].double().log_softmax(dim=-1)  # [V]
    chosen = [drawn, *all_of_them.topk(num_likeliest).indices.tolist()]
    found = [
        LogProb(token_id, _spell(tokenizer, before, token_id), float(all_of_them[token_id]))
        for token_id in chosen
    ]
    return LogProbs(found[0], tuple(found[1:]))


def _spell(tokenizer: Any, before: Sequence[int], token_id: int) -> str:
    """As it continues the token before: alone, some tokenizers drop its space."""
    if tokenizer is None:
        return ""
    last: str = tokenizer.decode(before[-1:])
    both: str = tokenizer.decode([*before[-1:], token_id])
    return both.removeprefix(last) if both.startswith(last) else str(tokenizer.decode([token_id]))
