"""/v1/chat/completions: a whole answer, or its events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
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
    DONE,
    Head,
    about,
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
        asked = Asked(body.prompt(), body.options(), family)
    whole = partial(_whole, head=Head(_PREFIX, "chat.completion", model))
    chunk = Head(_PREFIX, "chat.completion.chunk", model)
    events = partial(_events, head=chunk, wants_usage=body.wants_usage) if body.stream else None
    return await reply(request, desk, asked, whole, events, failed)


async def _whole(answer: Answer, head: Head) -> Response:
    said: list[Said] = []
    entries: list[dict[str, Any]] = []
    async for step in answer.steps():
        said += step.said
        if step.piece is not None and step.piece.drawn is not None:
            entries.append(chat_entry(step.piece))
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
        "logprobs": {"content": entries, "refusal": None} if entries else None,
        "finish_reason": _finish_reason(answer),
    }
    result = answer.result
    return JSONResponse(head.document([choice], usage=usage_of(result), flashmoe=about(result)))


async def _events(answer: Answer, head: Head, wants_usage: bool) -> AsyncGenerator[str, None]:
    """Log probabilities of tokens that show no text yet go with the next text."""
    more: dict[str, Any] = {"usage": None} if wants_usage else {}
    yield event(head.document([_delta({"role": "assistant", "content": ""})], **more))
    entries: list[dict[str, Any]] = []
    num_calls = 0
    async for step in answer.steps():
        if step.piece is not None and step.piece.drawn is not None:
            entries.append(chat_entry(step.piece))
        deltas, num_calls = _deltas(step.said, num_calls)
        for delta in deltas:
            yield event(head.document([_delta(delta, entries)], **more))
            entries = []
    result = answer.result
    last = _delta({}, entries, _finish_reason(answer))
    yield event(head.document([last], flashmoe=about(result), **more))
    if wants_usage:
        yield event(head.document([], usage=usage_of(result)))
    yield DONE


def _deltas(said: Sequence[Said], num_calls: int) -> tuple[list[dict[str, Any]], int]:
    """And how many calls there were by now."""
    deltas: list[dict[str, Any]] = []
    for one in said:
        match one:
            case Text(text):
                deltas.append({"content": text})
            case Thought(text):
                deltas.append({"reasoning_content": text})
            case Call():
                deltas.append({"tool_calls": [{"index": num_calls, **_call(one)}]})
                num_calls += 1
    return deltas, num_calls


def _delta(
    delta: dict[str, Any],
    entries: Sequence[dict[str, Any]] = (),
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": 0,
        "delta": delta,
        "logprobs": {"content": list(entries), "refusal": None} if entries else None,
        "finish_reason": finish_reason,
    }


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_call_id(), "type": "function", "function": function}


def _finish_reason(answer: Answer) -> str:
    return "tool_calls" if answer.num_calls else answer.result.finish_reason
