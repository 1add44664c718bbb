"""Stop strings and streamed characters. Fault seen red: emitting text that begins a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compute_node.text import Detokenizer, StopStrings
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
