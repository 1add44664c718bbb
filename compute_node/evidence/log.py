"""The evidence arrow's near end: what was routed where, to a Redis stream. Never waits; drops
and counts instead.
"""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress
from typing import Any

import redis

from proto import redis_schema
from proto.access import DecodeAccess, PrefillAccess
from proto.stats import counter

logger = logging.getLogger(__name__)

_CAPACITY = 256
_RETRY_S = 0.5
_ENTRY_BYTES = 128  # what Redis keeps beside the message
_PAGE, _HELP = "flashmoe_node_evidence", "Evidence entries"


class AccessLog:
    """Sends from a thread of its own. Use as a context manager.

    obstacle: why the last event did not arrive; empty when it did
    """

    num_sent: int = counter(_PAGE, _HELP, key="evidence_sent", outcome="sent")

    def __init__(self, client: redis.Redis, fingerprint: str) -> None:
        self._redis = client
        self._stream = redis_schema.access_stream(fingerprint)
        self._events: queue.Queue[DecodeAccess | PrefillAccess] = queue.Queue(_CAPACITY)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._num_overflowed = 0  # one writer each: the thread that appends, and our own
        self._num_refused = 0
        self.obstacle = ""

    @property
    @counter(_PAGE, _HELP, key="evidence_dropped", outcome="dropped")
    def num_dropped(self) -> int:
        """Events that never arrived: Redis away or full, too many to wait, or left at the end."""
        return self._num_overflowed + self._num_refused

    def __enter__(self) -> AccessLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._num_refused += self._forget_waiting()
        if self.num_dropped:
            logger.warning("evidence dropped in all", extra={"events": self.num_dropped})

    def append(self, event: DecodeAccess | PrefillAccess) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._num_overflowed += 1

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                event = self._events.get(timeout=0.1)
            except queue.Empty:
                continue
            self._send(event)

    def _send(self, event: DecodeAccess | PrefillAccess) -> None:
        fields: Any = event.encode()
        maxlen = redis_schema.access_stream_maxlen(len(fields["access"]) + _ENTRY_BYTES)
        try:
            self._redis.xadd(self._stream, fields, maxlen=maxlen, approximate=True)
        except (redis.RedisError, OSError) as error:
            self._num_refused += 1 + self._forget_waiting()
            if not self.obstacle:
                logger.warning("evidence dropped", extra={"reason": str(error)})
            self.obstacle = f"the last evidence did not arrive at Redis ({error})"
            self._stopping.wait(_RETRY_S)
            return
        if self.obstacle:
            logger.info("evidence arrives again", extra={"dropped": self.num_dropped})
        self.obstacle = ""
        self.num_sent += 1

    def _forget_waiting(self) -> int:
        """They would be old when Redis is back. Returns how many."""
        count = 0
        with suppress(queue.Empty):
            while True:
                self._events.get_nowait()
                count += 1
        return count
