"""One look at the stack a second, for all who watch; none while nobody does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict

from compute_node.live.look import Asker
from compute_node.live.reading import Looks
from proto import errors

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_MOST_VIEWERS = 32


class Feed:
    """Use as an async context manager: at its end every viewer's frames end, so that a page which
    is open does not hold the gateway up.
    """

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._looks = Looks()
        self._frame, self._number = b"", 0
        self._changed = asyncio.Event()  # another one for each frame
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False
        self.num_viewers = 0

    async def __aenter__(self) -> Feed:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        self._end_looking()

    def check_room(self) -> None:
        """Raises QueueFull when as many watch as may."""
        if self.num_viewers >= _MOST_VIEWERS:
            raise errors.QueueFull(
                f"{self.num_viewers} pages watch already: close one, or use `flashmoe top`"
            )

    async def frames(self) -> AsyncIterator[bytes]:
        """Figures as an event each second, until the feed ends. A slow viewer misses some."""
        self.num_viewers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(lambda _: self._wake())
        seen = self._number
        try:
            while await self._another(seen):
                seen = self._number
                yield self._frame
        finally:
            self.num_viewers -= 1
            if not self.num_viewers:
                self._end_looking()

    async def _another(self, seen: int) -> bool:
        """Wait for a frame after the one with that number. False: there is none."""
        while self._number == seen and not self._has_ended:
            await self._changed.wait()
        return not self._has_ended

    @property
    def _has_ended(self) -> bool:
        return self._is_closed or self._looking is None or self._looking.done()

    def _end_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def _wake(self) -> None:
        """All who wait for a frame, or for the end."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _look(self) -> None:
        """Until it is cancelled. A defect ends the viewers' frames, and is logged."""
        try:
            while True:
                self._looks.add(await self._asker.look())
                figures = json.dumps(asdict(self._looks.figures()), separators=(",", ":"))
                self._frame, self._number = f"data: {figures}\n\n".encode(), self._number + 1
                self._wake()
                await asyncio.sleep(_INTERVAL_S)
        except Exception:
            logger.exception("look at the stack failed")
            raise
