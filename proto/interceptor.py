"""What stands between gRPC and every method of a daemon: it decodes requests, and turns errors into
statuses.

gRPC answers bytes that are no message, and a raised error, with UNKNOWN and a traceback in the log,
each time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from proto import errors

logger = logging.getLogger(__name__)

Decode = Callable[[Any], Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a raised FlashMoEError into its status, so that no servicer needs a try.

    max_request_bytes: longer ones are refused before they are decoded, which may take fifty times
    their bytes
    """

    def __init__(self, max_request_bytes: int) -> None:
        self._max_request_bytes = max_request_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        decode = _decoder(handler.request_deserializer, method, self._max_request_bytes)
        if handler.request_streaming:
            decode = _each(decode)
        raw = handler._replace(request_deserializer=None)
        if handler.unary_unary:
            return raw._replace(unary_unary=_guard_unary(handler.unary_unary, decode))
        if handler.stream_unary:
            return raw._replace(stream_unary=_guard_unary(handler.stream_unary, decode))
        if handler.unary_stream:
            return raw._replace(unary_stream=_guard_stream(handler.unary_stream, decode))
        return raw._replace(stream_stream=_guard_stream(handler.stream_stream, decode))


def _decoder(deserialize: Decode | None, method: str, max_bytes: int) -> Decode:
    """From bytes to a message. It raises InvalidRequest."""

    def decode(data: bytes) -> Any:
        if len(data) > max_bytes:
            raise errors.InvalidRequest(
                f"a request of {len(data):,} bytes, {method} takes {max_bytes:,}: ask for less"
            )
        try:
            return deserialize(data) if deserialize else data
        except DecodeError as error:
            logger.warning("undecodable request", extra={"method": method})
            raise errors.InvalidRequest(f"not a message of {method}: {error}") from error

    return decode


def _each(decode: Decode) -> Decode:
    async def decode_each(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for request in requests:
            yield decode(request)

    return decode_each


def _guard_unary(method: Callable[[Any, Any], Awaitable[Any]], decode: Decode) -> Any:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(decode(request), context)
        except errors.FlashMoEError as error:
            await errors.abort(context, error)

    return call


def _guard_stream(method: Callable[[Any, Any], Any], decode: Decode) -> Any:
    """method: yields its replies, or writes them to the context as gRPC's health service does."""

    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            replies = method(decode(request), context)
            if inspect.isawaitable(replies):
                await replies
                return
            async for reply in replies:
                yield reply
        except errors.FlashMoEError as error:
            await errors.abort(context, error)

    return call
