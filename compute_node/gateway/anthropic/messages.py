"""/v1/messages: a whole answer, or its events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from compute_node.client.result import Result
from compute_node.gateway.answer import Answer, Asked
from compute_node.gateway.anthropic.blocks import Blocks, event, failed
from compute_node.gateway.anthropic.body import MessagesBody
from compute_node.gateway.desk import Desk
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.reply import reply


async def messages(request: Request, desk: Desk) -> ASGIApp:
    """Raises what the request is refused for, before any status is sent."""
    async with desk.bodies.parsed(request, MessagesBody) as body:
        body.check()
        model = await desk.node.checked(body.model)
        family = Family((await desk.node.describe()).chat_template, body.offered())
        asked = Asked(body.prompt(), body.options(), family, body.held(family))
    events = partial(_events, model=model) if body.stream else None
    return await reply(request, desk, asked, partial(_whole, model=model), events, failed)


async def _whole(answer: Answer, model: str) -> Response:
    blocks = Blocks()
    async for step in answer.steps():
        for said in step.said:
            for _ in blocks.add(said):
                pass
    result = answer.result
    usage = {**_usage(result.prompt_token_ids, result), "output_tokens": len(result.token_ids)}
    return JSONResponse(
        {**_message(model), "content": blocks.content, **_stop(answer), "usage": usage}
    )


async def _events(answer: Answer, model: str) -> AsyncGenerator[str, None]:
    usage = {**_usage(answer.generation.prompt_token_ids, None), "output_tokens": 0}
    start = {**_message(model), "content": [], "stop_reason": None, "stop_sequence": None}
    yield event("message_start", message={**start, "usage": usage})
    blocks = Blocks()
    async for step in answer.steps():
        for said in step.said:
            for one in blocks.add(said):
                yield one
    for one in blocks.close():
        yield one
    result = answer.result
    usage = {**_usage(result.prompt_token_ids, result), "output_tokens": len(result.token_ids)}
    yield event("message_delta", delta=_stop(answer), usage=usage)
    yield event("message_stop")


def _message(model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
    }


def _usage(prompt: list[int], result: Result | None) -> dict[str, Any]:
    """Anthropic counts what was reused apart; before the end nothing is known of it."""
    reused = result.reused_tokens if result is not None else 0
    return {
        "input_tokens": len(prompt) - reused,
        "cache_read_input_tokens": reused,
        "cache_creation_input_tokens": 0,
    }


def _stop(answer: Answer) -> dict[str, Any]:
    result = answer.result
    if answer.num_calls:
        reason = "tool_use"
    elif result.stop:
        reason = "stop_sequence"
    else:
        reason = "max_tokens" if result.finish_reason == "length" else "end_turn"
    return {"stop_reason": reason, "stop_sequence": result.stop or None}
