"""How an answer is spelled and ends, told token by token.

Planted faults seen red: stop strings that are special tokens never found, the end of the text not
shown on request, a last incomplete character lost.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compute_node.engine.request import Request
from compute_node.engine.writer import Writer
from tests.compute_node.engine.test_text import TOKENIZERS, ids_of

TOKENIZER = TOKENIZERS["byte-level"]
(END,) = ids_of(TOKENIZER, "<|end|>")
AB, CUT = ids_of(TOKENIZER, "ab"), ids_of(TOKENIZER, "ab😀")[:-1]


def write(tokens: list[int], **options: Any) -> tuple[str, str]:
    """Text and reason when a model wants these tokens."""
    request = Request(tuple(ids_of(TOKENIZER, "x")), max_tokens=len(tokens), **options)
    writer = Writer(request, TOKENIZER, frozenset({END}))
    so_far, text = list(request.token_ids), ""
    for token in tokens:
        logits = torch.zeros(1, len(TOKENIZER))
        logits[0, token] = 1.0
        text += writer.next(so_far, logits).text
        if writer.finish_reason:
            break
    text += writer.flush()
    return text, writer.finish_reason


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        ([*AB, END, *AB], {}, ("ab", "stop")),
        ([*AB, END, *AB], {"skip_special_tokens": False}, ("ab<|end|>", "stop")),
        ([*AB, END, *AB], {"ignore_eos": True}, ("abab", "length")),
        (
            [*AB, END, *AB],
            {"ignore_eos": True, "skip_special_tokens": False},
            ("ab<|end|>ab", "length"),
        ),
        ([*AB, END, *AB], {"ignore_eos": True, "stop": ("<|end|>",)}, ("ab", "stop")),
        (
            [*AB, END, *AB],
            {"ignore_eos": True, "stop": ("<|end|>",), "skip_special_tokens": False},
            ("ab", "stop"),
        ),
        (
            [*AB, END, *AB],
            {"ignore_eos": True, "stop": ("b<|end|>a",), "skip_special_tokens": False},
            ("a", "stop"),
        ),
        (CUT, {}, ("ab\ufffd", "length")),
        (CUT, {"stop": ("\ufffd",)}, ("ab", "stop")),
        ([*CUT, END], {}, ("ab\ufffd", "stop")),
    ],
)
def test_text_and_end(
    tokens: list[int], options: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert write(tokens, **options) == expected


def test_without_a_tokenizer_there_is_no_text() -> None:
    writer = Writer(Request((5,), max_tokens=1), None, frozenset())
    token = writer.next([5], torch.eye(9)[3:4])
    assert (token.token_id, token.text, writer.flush()) == (3, "", "")
    assert writer.finish_reason == "length"
