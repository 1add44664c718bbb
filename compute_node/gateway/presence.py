"""Work for a client that may leave: it ends when the client does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from proto import errors

Outcome = TypeVar("Outcome")


async def while_present(receive: Receive, work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """What `work` returns. Raises Cancelled when the client leaves first: the work is cancelled and
    has ended.
    """
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait([doing, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise errors.Cancelled("the client left")
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait([doing, leaving])


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
