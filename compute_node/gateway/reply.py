"""An answer as a response: whole, or its events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from compute_node.gateway.answer import Answer, Asked, begin
from compute_node.gateway.desk import Desk
from compute_node.gateway.event_stream import EventStream
from compute_node.gateway.presence import while_present
from compute_node.gateway.refusals import Failure


async def reply(
    request: Request,
    desk: Desk,
    asked: Asked,
    whole: Callable[[Answer], Coroutine[Any, Any, Response]],
    events: Callable[[Answer], AsyncGenerator[str, None]] | None,
    failed: Callable[[Failure], str],
) -> ASGIApp:
    """events: None: the answer is wanted whole; failed: see EventStream

    Raises what the request is refused for, before any status is sent.
    """
    answer = await while_present(request.receive, begin(desk.node, asked, desk.client(request)))
    if events is not None:
        return EventStream(events(answer), failed, desk.note_gone, answer.aclose)
    try:
        return await while_present(request.receive, whole(answer))
    finally:
        await answer.aclose()
