"""What both of OpenAI's ways to generate answer: usage, ids, events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from compute_node.client.result import Result
from compute_node.gateway.refusals import Failure

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Head:
    """What every document of one answer begins with."""

    prefix: str
    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def usage_of(result: Result) -> dict[str, Any]:
    num_prompt, num_answer = len(result.prompt_token_ids), len(result.token_ids)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": result.reused_tokens},
    }


def about(result: Result) -> dict[str, Any]:
    """What FlashMoE says beside: how it was computed, and what to know of it."""
    return {
        "quality": result.quality,
        "warnings": list(result.warnings),
        "ttft_s": round(result.ttft_s, 6),
        "tokens_per_s": round(result.tokens_per_s, 3),
        "queued_s": round(result.queued_s, 6),
    }


def event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


def failed(failure: Failure) -> str:
    """An event that OpenAI's clients raise on."""
    return event(failure.document())


def ending(head: Head, last: dict[str, Any], result: Result, wants_usage: bool) -> Iterator[str]:
    """The events after the last text. last: the choice with the reason why it ended"""
    more: dict[str, Any] = {"usage": None} if wants_usage else {}
    yield event(head.document([last], flashmoe=about(result), **more))
    if wants_usage:
        yield event(head.document([], usage=usage_of(result)))
    yield DONE
