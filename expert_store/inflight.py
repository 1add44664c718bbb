"""Single flight: one read of a key at a time, for everybody who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from proto.expert import ExpertKey

T = TypeVar("T")


class Inflight(Generic[T]):
    """Reads under way, by key."""

    def __init__(self) -> None:
        self._reads: dict[ExpertKey, asyncio.Task[T]] = {}

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._reads

    def __len__(self) -> int:
        return len(self._reads)

    async def join(self, key: ExpertKey, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Start `read` for `key`, or wait for the one already running.

        A waiter that is cancelled leaves; the read goes on for the others.
        """
        return await asyncio.shield(self.start(key, read))

    def start(self, key: ExpertKey, read: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        task = self._reads.get(key)
        if task is None:
            task = self._reads[key] = asyncio.create_task(read())
            task.add_done_callback(lambda done: self._finish(key, done))
        return task

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._reads:
            await asyncio.wait(list(self._reads.values()))

    def _finish(self, key: ExpertKey, task: asyncio.Task[T]) -> None:
        del self._reads[key]
        if not task.cancelled():
            task.exception()  # a read nobody waits for any more may fail: the store has counted it
