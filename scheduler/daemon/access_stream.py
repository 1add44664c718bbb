"""Reads evidence from Redis with a consumer group; the reader end of that arrow.

An entry is acknowledged once it is handled, so a restart resumes where the last run stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from proto import errors, redis_schema
from proto.access import DecodeAccess, PrefillAccess, decode_access
from proto.stats import counter, gauge

logger = logging.getLogger(__name__)

READ_COUNT = 128
FIRST_BACKOFF_S = 0.05
# NOGROUP: Valkey restarted empty. UNBLOCKED: the stream was deleted while we waited on it.
GROUP_LOST = ("NOGROUP", "UNBLOCKED")

RawEntry = tuple[bytes, Mapping[bytes, bytes] | None]


class AccessStream:
    """One consumer of the group. What Redis does, it counts and survives.

    obstacle: why nothing can be read now; empty when it can
    """

    connected: bool = gauge(
        "flashmoe_scheduler_redis_connected",
        "1 while evidence can be read",
        key="redis_connected",
        start=False,
    )
    entries_rejected = 0  # shown with those that nobody could follow
    entries_lost: int = counter("flashmoe_scheduler_events_lost", "events lost", key="events_lost")
    entries_claimed: int = counter(
        "flashmoe_scheduler_events_claimed", "events claimed", key="events_claimed"
    )
    groups_created: int = counter("flashmoe_scheduler_groups_created", "groups created")
    read_failures: int = counter("flashmoe_scheduler_read_failures", "read failures")

    def __init__(
        self,
        redis: Redis,
        fingerprint: str,
        consumer: str,
        *,
        block_s: float,
        claim_idle_s: float,
        reconnect_max_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._stream = redis_schema.access_stream(fingerprint)
        self._consumer = consumer
        self._block_ms = max(1, int(block_s * 1000))
        self._claim_idle_s = claim_idle_s
        self._reconnect_max_s = reconnect_max_s
        self._clock = clock
        self._has_group = False
        self._has_own_pending = True
        self._claim_due_s = clock()
        self.obstacle = "Redis has not answered yet"
        self.backoff_s = 0.0

    async def read(self) -> list[RawEntry]:
        """The next entries, at most READ_COUNT: our own pending ones, dead consumers', new ones.

        Empty when none came in time, or when Redis is away: then wait `backoff_s` and read again.
        """
        try:
            entries = await self._read()
        except (exceptions.RedisError, OSError) as error:
            self._on_failure(error)
            return []
        self._on_success()
        return entries

    def decode(self, entries: Sequence[RawEntry]) -> list[DecodeAccess | PrefillAccess]:
        """What can be decoded; the rest is counted as rejected, or as lost when it was trimmed."""
        events = (self._decode(fields) for _, fields in entries)
        return [event for event in events if event is not None]

    async def ack(self, entries: Sequence[RawEntry]) -> None:
        """These are handled. Should Redis be away, they come again."""
        try:
            await self._redis.xack(
                self._stream, redis_schema.SCHEDULER_GROUP, *(entry_id for entry_id, _ in entries)
            )
        except (exceptions.RedisError, OSError) as error:
            self._on_failure(error)

    async def _read(self) -> list[RawEntry]:
        if not self._has_group:
            await self._create_group()
        if self._has_own_pending:
            entries = await self._read_group("0")
            self._has_own_pending = bool(entries)
            if entries:
                return entries
        return await self._claim() or await self._read_group(">")

    async def _create_group(self) -> None:
        try:
            await self._redis.xgroup_create(
                self._stream, redis_schema.SCHEDULER_GROUP, id="0", mkstream=True
            )
            self.groups_created += 1
        except exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._has_group = True
        self._has_own_pending = True

    async def _read_group(self, after: str) -> list[RawEntry]:
        reply: Any = await self._redis.xreadgroup(
            redis_schema.SCHEDULER_GROUP,
            self._consumer,
            {self._stream: after},
            count=READ_COUNT,
            block=self._block_ms,
        )
        return [(entry_id, fields) for _, entries in reply for entry_id, fields in entries]

    async def _claim(self) -> list[RawEntry]:
        """Take over what a consumer that died left unacknowledged, now and then."""
        if self._clock() < self._claim_due_s:
            return []
        reply: Any = await self._redis.xautoclaim(
            self._stream,
            redis_schema.SCHEDULER_GROUP,
            self._consumer,
            min_idle_time=int(self._claim_idle_s * 1000),
            count=READ_COUNT,
        )
        entries: list[RawEntry] = reply[1]
        self.entries_claimed += len(entries)
        if not entries:
            self._claim_due_s = self._clock() + self._claim_idle_s
        return entries

    def _decode(self, fields: Mapping[bytes, bytes] | None) -> DecodeAccess | PrefillAccess | None:
        if not fields:
            self.entries_lost += 1
            return None
        try:
            return decode_access(fields)
        except errors.MessageInvalid as error:
            self.entries_rejected += 1
            logger.warning("evidence rejected", extra={"reason": str(error)})
            return None

    def _on_success(self) -> None:
        if not self.connected:
            logger.info("redis connected", extra={"stream": self._stream})
        self.connected = True
        self.obstacle = ""
        self.backoff_s = 0.0

    def _on_failure(self, error: Exception) -> None:
        self._has_group = False
        self._has_own_pending = True
        if str(error).startswith(GROUP_LOST):
            logger.info("consumer group lost", extra={"reason": str(error)})
            return
        self.read_failures += 1
        if self.connected or not self.backoff_s:
            logger.warning("redis away", extra={"reason": str(error)})
        self.connected = False
        self.obstacle = f"Redis gives no evidence ({error})"
        self.backoff_s = min(max(FIRST_BACKOFF_S, 2 * self.backoff_s), self._reconnect_max_s)
