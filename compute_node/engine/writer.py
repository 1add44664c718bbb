"""From logits to an answer: tokens drawn, their text, and where it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compute_node.engine.grammar import HeldAnswer
from compute_node.engine.log_probs import LogProbs, log_probs_of
from compute_node.engine.request import Request
from compute_node.engine.sampling import Sampler
from compute_node.engine.text import Detokenizer, StopStrings, special_stop_ids
from compute_node.predict.drawing import Drawing


@dataclass(frozen=True)
class Token:
    """text may be empty: a character or a stop string is not complete yet.

    log_probs: None where nobody asked for them
    """

    token_id: int
    text: str
    log_probs: LogProbs | None = None


def _draw(sampler: Sampler, held: HeldAnswer | None, token_ids: list[int], logits: Tensor) -> int:
    """logits: [1, V]. What is held hears of the token; once it is complete it bars none, for a
    forecast goes on.
    """
    if held is None or held.is_complete:
        return sampler.draw(token_ids, logits)
    token_id = sampler.draw(token_ids, logits, held.allowed())
    held.accept(token_id)
    return token_id


@dataclass(frozen=True)
class Forecast:
    """What a step may know of the tokens after it.

    new_draw: makes what draws them here, without a trace; drawing: how, for another process, which
    knows nothing of what the answer is held to
    """

    new_draw: Callable[[], Callable[[Tensor], int]]
    drawing: Callable[[], Drawing]


class Writer:
    """Draws tokens, spells them, and knows when to stop."""

    def __init__(self, request: Request, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self._sampler = Sampler(request.sampling, len(request.token_ids))
        skip = request.skip_special_tokens
        self._detokenizer = Detokenizer(tokenizer, request.token_ids, skip)
        self._stops = StopStrings(request.stop)
        self._stop_tokens = special_stop_ids(tokenizer, request.stop)
        self._silent_ids = request.stop_token_ids | self._stop_tokens.keys()
        self._eos_ids = frozenset() if request.ignore_eos else eos_ids
        if skip:
            self._silent_ids |= self._eos_ids
        self._tokenizer, self._num_likeliest = tokenizer, request.log_probs
        self._left = request.max_tokens
        self._held = request.held.copy() if request.held is not None else None
        self.finish_reason, self._stop_token = "", ""

    def next(self, token_ids: list[int], logits: Tensor) -> Token:
        """The token after `token_ids`, which it joins. logits: [1, V]"""
        token_id = _draw(self._sampler, self._held, token_ids, logits)
        log_probs = self._log_probs(token_ids, logits, token_id)
        token_ids.append(token_id)
        self._left -= 1
        return Token(token_id, self._spell(token_id), log_probs)

    def _spell(self, token_id: int) -> str:
        """The text that may go out now. Sets `finish_reason` when it is the last."""
        if token_id in self._silent_ids:
            self.finish_reason = "stop"
            self._stop_token = self._stop_tokens.get(token_id, "")
            return ""
        text = self._stops.add(self._detokenizer.add(token_id))
        is_complete = self._held is not None and self._held.is_complete
        if self._stops.found or is_complete or token_id in self._eos_ids:
            self.finish_reason = "stop"
        elif self._left == 0:
            self.finish_reason = "length"
        return text

    def _log_probs(self, token_ids: list[int], logits: Tensor, drawn: int) -> LogProbs | None:
        if self._num_likeliest is None:
            return None
        return log_probs_of(self._tokenizer, token_ids, logits, drawn, self._num_likeliest)

    @property
    def stop(self) -> str:
        """The stop string that ended it; empty: something else did."""
        return self._stops.found or self._stop_token

    def forecast(self, token_ids: list[int]) -> Forecast:
        """token_ids: so far, prompt included"""
        return Forecast(lambda: self.new_draw(token_ids), self._sampler.drawing)

    def new_draw(self, token_ids: list[int]) -> Callable[[Tensor], int]:
        """Draws what `next` would draw, without a trace: each call one token further.

        token_ids: so far, prompt included
        """
        sampler, ids = self._sampler.copy(), list(token_ids)
        held = self._held.copy() if self._held is not None else None

        def draw(logits: Tensor) -> int:
            ids.append(_draw(sampler, held, ids, logits))
            return ids[-1]

        return draw

    def flush(self) -> str:
        """What was held back and is no stop string."""
        text = self._stops.add("" if self._stops.found else self._detokenizer.flush())
        if self._stops.found:
            self.finish_reason = "stop"
        return text + self._stops.flush()
