"""Log probabilities as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from compute_node.client.result import Piece, TokenLogProb

_REPLACEMENT = "\ufffd"


def chat_entry(piece: Piece) -> dict[str, Any]:
    """Of one token of a chat's answer, which has log probabilities."""
    assert piece.drawn is not None
    return {**_one(piece.drawn), "top_logprobs": [_one(one) for one in piece.likeliest]}


def _one(found: TokenLogProb) -> dict[str, Any]:
    return {"token": found.text, "logprob": found.log_prob, "bytes": _bytes(found.text)}


def _bytes(text: str) -> list[int] | None:
    """None: the token is a part of a character."""
    return None if _REPLACEMENT in text else list(text.encode())


class CompletionLogProbs:
    """The older form of /v1/completions: lists side by side. offset: where the next token begins"""

    def __init__(self) -> None:
        self._offset = 0

    def document(self, pieces: list[Piece]) -> dict[str, Any]:
        drawn = [piece.drawn for piece in pieces if piece.drawn is not None]
        offsets = []
        for one in drawn:
            offsets.append(self._offset)
            self._offset += len(one.text)
        return {
            "tokens": [one.text for one in drawn],
            "token_logprobs": [one.log_prob for one in drawn],
            "top_logprobs": [
                {one.text: one.log_prob for one in piece.likeliest} for piece in pieces
            ],
            "text_offset": offsets,
        }
