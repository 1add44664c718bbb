"""What each token of a vocabulary adds to a text, in bytes: a grammar of text is one of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from compute_node.engine.text import special_token_ids
from proto import errors

_NEEDED = '{}[]":,-0123456789.eE \\truefalsnbA'  # what JSON is written with
_BATCH = 4096  # tokens whose texts are held at once
_LETTER = "a"  # what every other token is spelled behind
_HEX = frozenset("0123456789ABCDEFabcdef")


class TokenBytes:
    """Of one tokenizer.

    spelled:     by token id; empty: a special token, or one whose text depends on its neighbours
    special_ids: by their text
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a second for 150,000 tokens. Raises GrammarRefused as `check` does, and for a
        vocabulary that JSON cannot be written with.
        """
        check(tokenizer)
        special = special_token_ids(tokenizer)
        backend = tokenizer.backend_tokenizer
        spell = _speller(_decoders(backend))
        ids = backend.get_vocab(with_added_tokens=True)
        self.special_ids = {word: number for word, number in ids.items() if number in special}
        self.spelled = [b""] * (max(ids.values()) + 1)
        for word, number in ids.items():
            if number not in special:
                self.spelled[number] = spell(word)
        self._leave_out_others(backend)
        alone = {spelled for spelled in self.spelled if len(spelled) == 1}
        if lacking := [sign for sign in _NEEDED if sign.encode() not in alone]:
            raise errors.GrammarRefused(
                f"this model's vocabulary has no token for {lacking[0]!r} alone, so that JSON "
                "cannot be spelled with it: ask for JSON in the prompt"
            )

    def _leave_out_others(self, backend: Any) -> None:
        """Keep what the decoder itself spells so, behind another token."""
        before = backend.token_to_id(_LETTER)
        if before is None:
            raise errors.GrammarRefused(
                f"this model's vocabulary has no token for {_LETTER!r} alone: ask for JSON in the "
                "prompt"
            )
        for start in range(0, len(self.spelled), _BATCH):
            numbers = range(start, min(start + _BATCH, len(self.spelled)))
            pairs = [[before, number] for number in numbers]
            texts = backend.decode_batch(pairs, skip_special_tokens=False)
            for number, text in zip(numbers, texts, strict=True):
                if text != _LETTER + self.spelled[number].decode(errors="replace"):
                    self.spelled[number] = b""


def check(tokenizer: Any) -> None:
    """Raises GrammarRefused where the bytes of a token cannot be known: no tokenizer, one that is
    written in Python, or one that changes a text once it is joined.
    """
    if tokenizer is None:
        raise errors.GrammarRefused("this node has no tokenizer: a grammar needs one")
    kind = type(tokenizer)
    is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    if not is_fast or kind._decode is not PreTrainedTokenizerFast._decode:
        raise errors.GrammarRefused(
            f"a {kind.__name__} does not say what its tokens spell: ask for JSON in the prompt"
        )
    backend = tokenizer.backend_tokenizer
    if tokenizer.clean_up_tokenization_spaces and type(backend.model).__name__ != "BPE":
        raise errors.GrammarRefused(
            "this tokenizer cleans up spaces of a text once it is joined "
            "(clean_up_tokenization_spaces): ask for JSON in the prompt"
        )
    _speller(_decoders(backend))


def _decoders(backend: Any) -> list[Mapping[str, Any]]:
    """In their order."""
    if backend.decoder is None:
        return []
    return list(_flat(json.loads(backend.decoder.__getstate__())))


def _flat(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if state["type"] == "Sequence":
        for inner in state["decoders"]:
            yield from _flat(inner)
    else:
        yield state


def _speller(decoders: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """Spells a token of the vocabulary as these do behind other tokens. Raises GrammarRefused."""
    kinds = [state["type"] for state in decoders]
    if "ByteLevel" in kinds:
        return _byte_level
    replaced = dict(filter(None, map(_replaced, decoders)))
    known = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if not replaced or not known.issuperset(kinds):
        name = next((kind for kind in kinds if kind not in known), "nameless")
        raise errors.GrammarRefused(
            f"tokens of a {name} decoder are spelled by their neighbours: ask for JSON in the "
            "prompt"
        )

    def spell(word: str) -> bytes:
        if "ByteFallback" in kinds and _is_byte(word):
            return bytes([int(word[3:5], 16)])
        for mark, text in replaced.items():
            word = word.replace(mark, text)
        return word.encode()

    return spell


def _replaced(state: Mapping[str, Any]) -> tuple[str, str] | None:
    if state["type"] == "Metaspace":
        return state["replacement"], " "
    if state["type"] == "Replace" and "String" in state["pattern"]:
        return state["pattern"]["String"], state["content"]
    return None


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word[:3] == "<0x" and word[5] == ">" and _HEX.issuperset(word[3:5])


def _byte_level(word: str) -> bytes:
    """A token with other characters than those that stand for bytes is text."""
    try:
        return bytes(_BYTES[sign] for sign in word)
    except KeyError:
        return word.encode()


def _signs_of_bytes() -> Mapping[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others are numbered from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _signs_of_bytes()
