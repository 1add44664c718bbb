"""Reads request bodies: each bounded, all together bounded, and none for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from compute_node.gateway.refusals import Refused
from proto import errors

_ALL_BODIES = 4  # how many of the longest are held at once
_LONG_BYTES = 128 * 1024  # from here it is parsed on another thread

Body = TypeVar("Body", bound=BaseModel)


class Bodies:
    """held_bytes: of all bodies that are being read or answered"""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self.held_bytes = 0

    @asynccontextmanager
    async def parsed(self, request: Request, kind: type[Body]) -> AsyncIterator[Body]:
        """The body as `kind`, for the block.

        Raises Refused: too long, too slow, too much at once, or no such JSON; Cancelled when the
        client leaves.
        """
        raw = bytearray()
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._read(request, raw)
            except TimeoutError:
                raise Refused(
                    f"the body did not come within {self._timeout_s:g} s", status=408
                ) from None
            except ClientDisconnect:
                raise errors.Cancelled("the client left before it had sent its request") from None
            yield await _parse(bytes(raw), kind)
        finally:
            self.held_bytes -= len(raw)

    async def _read(self, request: Request, raw: bytearray) -> None:
        self._check(request.headers.get("content-length", "0"))
        async for chunk in request.stream():
            if len(raw) + len(chunk) > self._max_bytes:
                raise self._too_long()
            if self.held_bytes + len(chunk) > _ALL_BODIES * self._max_bytes:
                raise errors.QueueFull("too many long requests at once: retry later")
            raw += chunk
            self.held_bytes += len(chunk)

    def _check(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_long()

    def _too_long(self) -> Refused:
        return Refused(
            f"a body of more than {self._max_bytes:,} bytes: shorten it, or raise max_body_bytes",
            status=413,
            code="request_too_large",
        )


async def _parse(raw: bytes, kind: type[Body]) -> Body:
    """Raises Refused naming the first field that is wrong."""
    try:
        if len(raw) > _LONG_BYTES:
            return await asyncio.to_thread(kind.model_validate_json, raw)
        return kind.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise _refused(fault["loc"], fault["msg"]) from None


def _refused(location: tuple[int | str, ...], message: str) -> Refused:
    place = ".".join(
        str(part) for part in location if not str(part).startswith(("function-", "list["))
    )
    return Refused(f"{place or 'the body'}: {message}", param=place or None)
