"""What tokens spell: bytes that, put together, are the text that the tokenizer decodes.

Planted faults seen red: bytes of a fallback read as text, special tokens that spell, a decoder's
own text not compared.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compute_node.engine.token_bytes import TokenBytes
from proto import errors
from tests.compute_node.engine.test_text import TOKENIZERS

SIGNS = [chr(sign) for sign in range(32, 127)]
TEXTS = ['{"a": [1.5e-3, true, null], "b": "Grüße, 世界 🙂"}', "  two  spaces\n\tand a tab"]


def unigram() -> Any:
    """As T5's: metaspace, and nothing for what is not in the vocabulary."""
    words = ["<unk>", "</s>", "\u2581", *SIGNS[1:], "\u2581true", "ab", "\u2581{"]
    made = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def word_piece() -> Any:
    """As BERT's: a text depends on which tokens stand side by side."""
    vocab = {word: number for number, word in enumerate(["[UNK]", *SIGNS, "##a"])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


ALL = {**TOKENIZERS, "unigram": unigram()}


@pytest.mark.parametrize("name", ALL)
def test_together_they_spell_what_the_tokenizer_decodes(name: str) -> None:
    tokenizer = ALL[name]
    spelled = TokenBytes(tokenizer).spelled
    rng = random.Random(1)
    usable = [number for number, token in enumerate(spelled) if token]
    assert len(usable) > 90
    first = tokenizer.convert_tokens_to_ids("a")
    for _ in range(300):
        ids = rng.choices(usable, k=rng.randint(1, 12))
        text = b"a" + b"".join(spelled[number] for number in ids)
        try:
            expected = text.decode()
        except UnicodeDecodeError:  # what no grammar lets pass
            continue
        assert tokenizer.decode([first, *ids]) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_what_it_is_told_it_spells(name: str, text: str) -> None:
    spelled = TokenBytes(ALL[name]).spelled
    ids = ALL[name]("a" + text, add_special_tokens=False)["input_ids"]
    assert b"".join(spelled[number] for number in ids).lstrip() == b"a" + text.encode()


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("byte-level", {"<|endoftext|>", "<|pad|>", "<|end|>"}),
        ("sentencepiece", {"<unk>", "<s>", "</s>", "<|end|>"}),
        ("unigram", {"<unk>", "</s>"}),
    ],
)
def test_special_tokens_spell_nothing(name: str, special: set[str]) -> None:
    found = TokenBytes(ALL[name])
    assert found.special_ids.keys() == special
    assert all(found.spelled[number] == b"" for number in found.special_ids.values())


def test_what_the_decoder_spells_otherwise_is_left_out() -> None:
    """Here it strips a letter off the beginning of each token."""
    tokenizer = unigram()
    strips = [decoders.Replace("\u2581", " "), decoders.Strip("z", 1, 0), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(strips)
    spelled = TokenBytes(tokenizer).spelled
    left_out = [number for number, token in enumerate(spelled) if not token]
    assert set(tokenizer.convert_ids_to_tokens(left_out)) == {"<unk>", "</s>", "z"}


def cleaned() -> Any:
    tokenizer = unigram()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def without_braces() -> Any:
    made = Tokenizer(models.Unigram([(word, -1.0) for word in ("<unk>", "\u2581", "a")], unk_id=0))
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


class Overriding(PreTrainedTokenizerFast):
    def _decode(self, *arguments: Any, **options: Any) -> str:
        return str(super()._decode(*arguments, **options)).upper()


def overriding() -> Any:
    return Overriding(tokenizer_object=unigram().backend_tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "no tokenizer"),
        (word_piece(), "a WordPiece decoder are spelled by their neighbours"),
        (cleaned(), "clean_up_tokenization_spaces"),
        (without_braces(), "no token for '{' alone"),
        (overriding(), "an? Overriding does not say"),
        (object(), "an? object does not say"),
    ],
)
def test_what_cannot_be_known_is_refused_by_name(tokenizer: Any, message: str) -> None:
    with pytest.raises(errors.GrammarRefused, match=message):
        TokenBytes(tokenizer)
