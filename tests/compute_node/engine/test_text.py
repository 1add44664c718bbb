"""Stop strings and streamed characters.

Faults seen red: emitting text that begins a stop string, the prompt told again where its last
character is cut or is U+FFFD, a character's first bytes forgotten, text that ends incomplete lost.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compute_node.engine.text import Detokenizer, StopStrings, check_stops, special_stop_ids
from proto import errors
from tests.stack import MODEL


def feed(stops: StopStrings, pieces: list[str]) -> str:
    out = ""
    for piece in pieces:
        out += stops.add(piece)
        if stops.found:
            return out
    return out + stops.flush()


def test_stop_string_across_pieces() -> None:
    stops = StopStrings(["END"])
    assert feed(stops, ["a", "bE", "N", "Dx"]) == "ab"
    assert stops.found


def test_what_only_looked_like_a_stop_comes_out() -> None:
    stops = StopStrings(["END"])
    assert feed(stops, ["aE", "N", "x"]) == "aENx"
    assert not stops.found


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_equals_searching_the_whole_text(text: str, stop: list[str]) -> None:
    stops = StopStrings(stop)
    found = [text.find(s) for s in stop if s in text]
    got = feed(stops, list(text))
    if not found:
        assert got == text
    else:
        # Piecewise, the stop that completes first wins; it can begin later than another.
        assert stops.found and text.startswith(got)
        assert not any(s in got for s in stop)


def test_incomplete_characters_wait() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "Grüße, 世界 🙂 done"
    detokenizer = Detokenizer(tokenizer, tokenizer("x")["input_ids"])
    pieces = [detokenizer.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def sentencepiece() -> Any:
    """As Llama's and Mixtral's: metaspace, bytes for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "b", "\u2581a", "\u2581b", "ab", "\u2581ab", ".", "é"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581", "ab")]
    vocab = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spell = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*spell, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def with_added_tokens(tokenizer: Any) -> Any:
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


TOKENIZERS = {
    "byte-level": with_added_tokens(AutoTokenizer.from_pretrained(MODEL)),
    "sentencepiece": with_added_tokens(sentencepiece()),
}
PARTS = ["a", "b", "ab", " ", ".", "é", "世", "😀", "\ufffd", "<tool>", "<|end|>"]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def told(tokenizer: Any, prompt: list[int], new: list[int], skip: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return "".join([detokenizer.add(token) for token in new]) + detokenizer.flush()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), at=st.floats(0, 1), skip=st.booleans())
def test_told_is_what_decoding_adds_to_the_prompt(
    kind: str, parts: list[str], at: float, skip: bool
) -> None:
    """Wherever the prompt ends, within a character too."""
    tokenizer = TOKENIZERS[kind]
    ids = ids_of(tokenizer, "".join(parts))
    cut = round(at * len(ids))
    whole, prompt = (tokenizer.decode(part, skip_special_tokens=skip) for part in (ids, ids[:cut]))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False))
    assert told(tokenizer, ids[:cut], ids[cut:], skip) == whole[len(list(same)) :]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_prompt_is_never_told(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    cut, replacement = ids_of(tokenizer, "hello 😀"), ids_of(tokenizer, "a\ufffd")
    a = ids_of(tokenizer, "xab")[-1:]
    assert told(tokenizer, cut[:-1], cut[-1:]) == "😀"
    assert told(tokenizer, cut[:-1], a) == tokenizer.decode(a)
    assert told(tokenizer, replacement, a) == tokenizer.decode(a)
    assert told(tokenizer, replacement, replacement[-3:]) == "\ufffd"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_never_become_a_character_do_not_wait_for_ever(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    first = ids_of(tokenizer, "a世")[-3]
    detokenizer = Detokenizer(tokenizer, ids_of(tokenizer, "ab"))
    pieces = [detokenizer.add(first) for _ in range(200)]
    assert "\ufffd" in "".join(pieces)
    assert "ab" not in "".join(pieces)


def test_stop_strings_that_are_special_tokens() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert special_stop_ids(tokenizer, ["<|end|>", "ab"]) == {
        ids_of(tokenizer, "<|end|>")[0]: "<|end|>"
    }
    check_stops(tokenizer, ["<|end|>", "<tool>"], skip_special_tokens=True)
    check_stops(tokenizer, ["<|end|>x"], skip_special_tokens=False)
    with pytest.raises(errors.InvalidRequest, match="left out of the text"):
        check_stops(tokenizer, ["<|end|>x"], skip_special_tokens=True)
    with pytest.raises(errors.InvalidRequest, match="empty"):
        check_stops(tokenizer, [""], skip_special_tokens=True)
    with pytest.raises(errors.InvalidRequest, match="no tokenizer"):
        check_stops(None, ["x"], skip_special_tokens=True)
