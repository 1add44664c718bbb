"""Text in and out of tokens: prompts, streamed text, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from proto import errors


class Detokenizer:
    """Turns a stream of tokens into text; a character that is not complete yet waits."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._backend = tokenizer._tokenizer if tokenizer is not None else None
        # The prompt's last tokens decide how the first new one is spelled (leading space).
        self._stream = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=True)

    def add(self, token_id: int) -> str:
        if self._backend is None:
            return ""
        return self._stream.step(self._backend, token_id) or ""


class StopStrings:
    """Holds back text that may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that may go out now. Once a stop string is complete, `found` is true."""
        self._held += text
        positions = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if positions:
            self.found = True
            out, self._held = self._held[: min(positions)], ""
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


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Raises InvalidRequest when the model has no tokenizer."""
    _need(tokenizer)
    return list(tokenizer(prompt)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Through the tokenizer's own template. Raises InvalidRequest when it has none, or refuses
    the messages.
    """
    _need(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise errors.InvalidRequest("this model's tokenizer has no chat template: send a prompt")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise errors.InvalidRequest(f"the chat template refuses these messages: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise errors.InvalidRequest("this node has no tokenizer, its log says why: send token_ids")
