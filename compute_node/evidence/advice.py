"""The advice arrow's near end: the scheduler's latest word, kept in memory by a thread of its
own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import redis

from proto import errors, redis_schema
from proto.redis_schema import Advice
from proto.stats import fact, gauge

logger = logging.getLogger(__name__)

_RETRY_S = 0.5


class AdviceFeed:
    """Polls one key. Use as a context manager.

    obstacle: why the last look failed; empty when it did not
    """

    num_rejected: int = fact("advice not decoded", key="advice_rejected", start=0)

    def __init__(
        self,
        client: redis.Redis,
        fingerprint: str,
        node: str,
        poll_s: float,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._redis = client
        self._key = redis_schema.advice_key(fingerprint, node)
        self._poll_s = poll_s
        self._now_ns = now_ns
        self._latest: Advice | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="advice", daemon=True)
        self.obstacle = ""

    def __enter__(self) -> AdviceFeed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def fresh(self) -> Advice | None:
        """The latest advice while it is within its lifetime, else None."""
        latest = self._latest
        return latest if latest is not None and latest.is_fresh(self._now_ns()) else None

    @property
    @fact("of the latest advice", key="advice_version", start=0)
    def version(self) -> int:
        return self._latest.version if self._latest else 0

    @property
    @gauge("flashmoe_node_advice_age_seconds", "Age of advice", key="advice_age_s")
    def age_s(self) -> float | None:
        """Since the latest advice was made; None when there never was any."""
        return (self._now_ns() - self._latest.time_ns) / 1e9 if self._latest else None

    @property
    def is_stale(self) -> bool:
        """Whether there was advice, and nobody renewed it."""
        return self._latest is not None and self.fresh() is None

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stopping.wait(pause_s):
            pause_s = self._poll_s if self.poll() else _RETRY_S

    def poll(self) -> bool:
        """Look once; false when Redis or what it holds cannot be used."""
        try:
            data = self._redis.get(self._key)
            if isinstance(data, bytes):
                self._latest = Advice.decode(data)
        except (redis.RedisError, OSError) as error:
            self.obstacle = f"Redis gives no advice ({error})"
            return False  # it goes stale: visible as its age, counted as fallbacks
        except errors.MessageInvalid as error:
            self.num_rejected += 1
            self.obstacle = f"advice is rejected ({error})"
            logger.warning("advice rejected", extra={"reason": str(error)})
            return False
        self.obstacle = ""
        return True
