"""Server-sent events of one answer: sent as they come, ended with an error event if it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from compute_node.gateway.presence import while_present
from compute_node.gateway.refusals import Failure
from proto import errors

logger = logging.getLogger(__name__)

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies hold events back otherwise
]


class EventStream:
    """A response. events: what is sent, whole events; it is closed whatever happens

    failed: what a client is sent when they end with an error: one that it raises on
    gone:   called when the client left before the end
    close:  called at the end, however it came: events that nobody began to read give nothing back
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        failed: Callable[[Failure], str],
        gone: Callable[[], None],
        close: Callable[[], Awaitable[None]],
    ) -> None:
        self._events, self._failed, self._gone, self._close = events, failed, gone, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await while_present(receive, self._send_all(send))
        except errors.Cancelled:
            self._gone()
            return
        finally:
            await self._close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await _send(send, event)
        except errors.FlashMoEError as error:
            await _send(send, self._failed(Failure.of(error)))
        except asyncio.CancelledError:  # the gateway stops; to a client that left it goes nowhere
            stopping = errors.Unavailable("the gateway is stopping: retry when it is back")
            await _send(send, self._failed(Failure.of(stopping)))
            raise
        except Exception as error:
            logger.exception("an answer ended with a defect")
            defect = errors.FlashMoEError(f"a defect of the gateway: {type(error).__name__}")
            await _send(send, self._failed(Failure.of(defect)))


async def _send(send: Send, event: str) -> None:
    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
