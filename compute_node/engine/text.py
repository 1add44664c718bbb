"""Text in and out of tokens: prompts, streamed text, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proto import errors

_MAX_WAITING_TOKENS = 64  # what is no character by then never becomes one
_REPLACEMENT = "\ufffd"  # how a decoder spells bytes that are no character, or none yet


class Detokenizer:
    """Turns a stream of tokens into text; a character that is not complete yet waits.

    tokenizer: None where the checkpoint has none: no token has text
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The tokens before decide how a new one is spelled (leading space, a character's first
        # bytes); what they spell themselves has gone out.
        self._ids = list(prompt_ids)
        self._written = self._spell(self._ids)
        self._num_waiting = 0

    def add(self, token_id: int) -> str:
        """The new text that is complete."""
        self._ids.append(token_id)
        self._num_waiting += 1
        text = self._spell(self._ids)
        whole = text.rstrip(_REPLACEMENT)
        if whole == text or self._num_waiting >= _MAX_WAITING_TOKENS:
            return self._write_up_to(text)
        if not whole.startswith(self._written):
            return ""
        new, self._written = whole.removeprefix(self._written), whole
        if new:
            self._num_waiting = 1
        return new

    def flush(self) -> str:
        """What still waits, though its last character is not complete."""
        return self._write_up_to(self._spell(self._ids)) if self._num_waiting else ""

    def _write_up_to(self, text: str) -> str:
        """The part of `text`, which all tokens spell, that has not gone out."""
        written = self._written
        known = _num_common(written, text)
        if written[known:].strip(_REPLACEMENT):  # the decoder spells earlier tokens otherwise now
            new = self._spell(self._ids[-self._num_waiting :])
        else:  # where `written` had a character's first bytes, it is complete now
            new = text[known:]
        self._written = text
        if new and not written.endswith(_REPLACEMENT):  # what is new began with a token of its own
            self._ids = self._ids[-self._num_waiting :]
            self._written = self._spell(self._ids)
        self._num_waiting = 0 if new else self._num_waiting
        return new

    def _spell(self, token_ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text


def _num_common(a: str, b: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))


class StopStrings:
    """Holds back text that may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = ""

    def add(self, text: str) -> str:
        """The text that may go out now. `found` is the stop string that is complete, the first."""
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            out, self._held = self._held[:at], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def check_stops(tokenizer: Any, stops: Sequence[str], skip_special_tokens: bool) -> None:
    """Raises InvalidRequest for a stop string that no text can ever hold."""
    if stops and tokenizer is None:
        raise errors.InvalidRequest("this checkpoint has no tokenizer: send stop_token_ids")
    if "" in stops:
        raise errors.InvalidRequest("a stop string is empty: leave it out")
    special = _special_tokens(tokenizer) if stops and skip_special_tokens else frozenset()
    for stop in stops:
        inner = [token for token in special if token in stop and stop not in special]
        if inner:
            raise errors.InvalidRequest(
                f"the stop string {stop!r} holds {inner[0]!r}, which is left out of the text: set "
                "skip_special_tokens to false"
            )


def special_stop_ids(tokenizer: Any, stops: Sequence[str]) -> dict[int, str]:
    """The stop strings that are special tokens, which no text may show, by their ids."""
    if not stops:
        return {}
    special = [stop for stop in stops if stop in _special_tokens(tokenizer)]
    return dict(zip(tokenizer.convert_tokens_to_ids(special), special, strict=True))


def _special_tokens(tokenizer: Any) -> frozenset[str]:
    """What decoding leaves out: tokens with a role, and others that were added as special."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset((*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)))


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Of tokens that are marks and no text."""
    return frozenset(tokenizer.convert_tokens_to_ids(sorted(_special_tokens(tokenizer))))


def end_texts(tokenizer: Any, eos_ids: frozenset[int]) -> list[str]:
    """How tokens that end a text are spelled, where a text shows them."""
    if tokenizer is None:
        return []
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(eos_ids))]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Raises InvalidRequest when the model has no tokenizer."""
    need_tokenizer(tokenizer)
    return list(tokenizer(prompt)["input_ids"])


def need_tokenizer(tokenizer: Any) -> None:
    """Raises InvalidRequest when there is none."""
    if tokenizer is None:
        raise errors.InvalidRequest("this node has no tokenizer, its log says why: send token_ids")
