"""What a node says of itself once: its model, and what it takes at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from proto import compute_node_pb2 as pb


@dataclass(frozen=True)
class Description:
    """model: the name of the checkpoint's folder

    max_context_tokens: of prompt and answer
    trained_tokens:     what the model was trained for; 0: not known
    chat_template:      empty: the tokenizer has none
    end_texts:          special tokens that end a text
    quality:            of requests that name neither budget nor route
    grammar:            "on": answers can be held to one; else why not
    """

    model: str
    fingerprint: str
    max_context_tokens: int
    trained_tokens: int
    chat_template: str
    end_texts: tuple[str, ...]
    quality: str
    grammar: str

    @classmethod
    def from_pb(cls, message: pb.NodeDescription) -> Self:
        return cls(
            message.model,
            message.fingerprint,
            message.max_context_tokens,
            message.trained_tokens,
            message.chat_template,
            tuple(message.end_texts),
            message.quality,
            message.grammar or "off: the node is too old",
        )
