"""An answer as blocks of content, and as the events that build them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from compute_node.gateway.formats.said import Call, Said, Text, Thought
from compute_node.gateway.refusals import Failure


def event(kind: str, **document: Any) -> str:
    data = json.dumps({"type": kind, **document}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n"


def failed(failure: Failure) -> str:
    """An event that Anthropic's clients raise on."""
    return event("error", error=failure.anthropic_document()["error"])


class Blocks:
    """Text and thoughts of one kind in a row make one block, each call its own.

    content: the blocks so far, whole
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open: str | None = None

    def add(self, said: Said) -> Iterator[str]:
        """The events that it makes."""
        match said:
            case Text(text):
                yield from self._grow("text", text, {"type": "text", "text": ""})
            case Thought(text):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._grow("thinking", text, block)
            case Call():
                yield from self._call(said)

    def close(self) -> Iterator[str]:
        if self._open is not None:
            self._open = None
            yield event("content_block_stop", index=len(self.content) - 1)

    def _grow(self, kind: str, text: str, block: dict[str, Any]) -> Iterator[str]:
        if self._open != kind:
            yield from self._start(kind, block)
        self.content[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, call: Call) -> Iterator[str]:
        block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name}
        yield from self._start("tool_use", {**block, "input": {}})
        self.content[-1]["input"] = json.loads(call.arguments)
        yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        yield from self.close()

    def _start(self, kind: str, block: dict[str, Any]) -> Iterator[str]:
        yield from self.close()
        self._open = kind
        self.content.append(dict(block))
        yield event("content_block_start", index=len(self.content) - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> str:
        return event("content_block_delta", index=len(self.content) - 1, delta=delta)
