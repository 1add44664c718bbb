"""Publishes advice to Redis, one key a node; the writer end of that arrow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from redis import exceptions
from redis.asyncio import Redis

from proto import redis_schema
from proto.redis_schema import Advice
from proto.stats import counter, gauge
from scheduler.shadow.advisor import Verdict

logger = logging.getLogger(__name__)


class Publisher:
    """Versions begin at the wall clock in ms, so that they grow across restarts too.

    obstacle: why the last advice did not go out; empty when it did
    """

    version: int = gauge(
        "flashmoe_scheduler_advice_version", "version of the last advice", key="advice_version"
    )
    advice_published: int = counter("flashmoe_scheduler_advice_published", "advice published")
    advice_failed: int = counter("flashmoe_scheduler_advice_failed", "advice failed")

    def __init__(
        self,
        redis: Redis,
        fingerprint: str,
        lifetime_s: float,
        *,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._redis = redis
        self._fingerprint = fingerprint
        self._lifetime_s = lifetime_s
        self._time_ns = time_ns
        self._published_ns: int | None = None
        self.obstacle = ""
        self.version = time_ns() // 1_000_000

    @property
    @gauge("flashmoe_scheduler_advice_age_seconds", "since the last advice", key="advice_age_s")
    def age_s(self) -> float | None:
        """Since the last advice went out; None before the first."""
        if self._published_ns is None:
            return None
        return max(0, self._time_ns() - self._published_ns) / 1e9

    @property
    def needs_refresh(self) -> bool:
        """Whether the last advice did not go out, or is about to expire though we are well."""
        age_s = self.age_s
        return bool(self.obstacle) or (age_s is not None and age_s > self._lifetime_s / 2)

    async def publish(self, node: str, verdict: Verdict) -> None:
        """Tell `node` whom to follow."""
        advice = Advice(
            policy=verdict.policy,
            version=self.version + 1,
            time_ns=self._time_ns(),
            lifetime_s=self._lifetime_s,
            scores=verdict.scores,
            unused_scores=verdict.unused_scores,
            as_of_ns=verdict.as_of_ns,
        )
        key = redis_schema.advice_key(self._fingerprint, node)
        try:
            await self._redis.set(key, advice.encode(), px=max(1, int(self._lifetime_s * 1000)))
        except (exceptions.RedisError, OSError) as error:
            self._on_failure(error)
            return
        self.obstacle = ""
        self.version = advice.version
        self._published_ns = advice.time_ns
        self.advice_published += 1

    def _on_failure(self, error: Exception) -> None:
        self.advice_failed += 1
        if not self.obstacle:
            logger.warning("advice not published", extra={"reason": str(error)})
        self.obstacle = f"Redis takes no advice ({error})"
