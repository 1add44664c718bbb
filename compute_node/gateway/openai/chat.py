"""/v1/chat/completions: a whole answer, or its events."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from compute_node.gateway.answer import Answer, Asked, text_of
from compute_node.gateway.desk import Desk
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.formats.said import Call, Said, Text, Thought
from compute_node.gateway.openai.chat_body import ChatBody
from compute_node.gateway.openai.documents import (
    Head,
    about,
    ending,
    event,
    failed,
    new_call_id,
    usage_of,
)
from compute_node.gateway.openai.log_probs import chat_entry
from compute_node.gateway.reply import reply

_PREFIX = "chatcmpl"


async def chat(request: Request, desk: Desk) -> ASGIApp:
    """Raises what the request is refused for, before any status is sent."""
    async with desk.bodies.parsed(request, ChatBody) as body:
        body.check()
        model = await desk.node.checked(body.model)
        family = Family((await desk.node.describe()).chat_template, body.offered())
        asked = Asked(body.prompt(), body.options(), family, body.held(family))
    whole = partial(_whole, head=Head(_PREFIX, "chat.completion", model))
    chunk = Head(_PREFIX, "chat.completion.chunk", model)
    events = partial(_events, head=chunk, wants_usage=body.wants_usage) if body.stream else None
    return await reply(request, desk, asked, whole, events, failed)


async def _whole(answer: Answer, head: Head) -> Response:
    said: list[Said] = []
    entries: list[dict[str, Any]] = []
    async for step in answer.steps():
        said += step.said
        if step.scored is not None:
            entries.append(chat_entry(step.scored))
    calls = [_call(one) for one in said if isinstance(one, Call)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text_of(said) or (None if calls else ""),
    }
    if thoughts := text_of(said, Thought):
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _log_probs(entries),
        "finish_reason": _finish_reason(answer),
    }
    result = answer.result
    return JSONResponse(head.document([choice], usage=usage_of(result), flashmoe=about(result)))


async def _events(answer: Answer, head: Head, wants_usage: bool) -> AsyncGenerator[str, None]:
    """Log probabilities of tokens that show no text yet go with the next text."""
    more: dict[str, Any] = {"usage": None} if wants_usage else {}
    yield event(head.document([_delta({"role": "assistant", "content": ""})], **more))
    entries: list[dict[str, Any]] = []
    numbers = itertools.count()
    async for step in answer.steps():
        if step.scored is not None:
            entries.append(chat_entry(step.scored))
        for delta in _deltas(step.said, numbers):
            yield event(head.document([_delta(delta, entries)], **more))
            entries = []
    result = answer.result
    last = _delta({}, entries, _finish_reason(answer))
    for one in ending(head, last, result, wants_usage):
        yield one


def _deltas(said: Sequence[Said], numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    """numbers: of calls"""
    for one in said:
        match one:
            case Text(text):
                yield {"content": text}
            case Thought(text):
                yield {"reasoning_content": text}
            case Call():
                yield {"tool_calls": [{"index": next(numbers), **_call(one)}]}


def _delta(
    delta: dict[str, Any],
    entries: Sequence[dict[str, Any]] = (),
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": 0,
        "delta": delta,
        "logprobs": _log_probs(entries),
        "finish_reason": finish_reason,
    }


def _log_probs(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": list(entries), "refusal": None} if entries else None


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_call_id(), "type": "function", "function": function}


def _finish_reason(answer: Answer) -> str:
    return "tool_calls" if answer.num_calls else answer.result.finish_reason
