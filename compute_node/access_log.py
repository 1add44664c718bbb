"""The evidence arrow's near end: what was routed where, to a Redis stream. Never waits; drops
and counts instead.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

import redis

from proto import redis_schema
from proto.redis_schema import DecodeAccess, PrefillAccess

logger = logging.getLogger(__name__)

_CAPACITY = 256
_RETRY_S = 0.5


class AccessLog:
    """Sends from a thread of its own. Use as a context manager."""

    def __init__(self, client: redis.Redis, fingerprint: str) -> None:
        self._redis = client
        self._stream = redis_schema.access_stream(fingerprint)
        self._events: queue.Queue[DecodeAccess | PrefillAccess] = queue.Queue(_CAPACITY)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._connected = True
        self.num_sent = 0
        self.num_dropped = 0

    def __enter__(self) -> AccessLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def append(self, event: DecodeAccess | PrefillAccess) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.num_dropped += 1

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                event = self._events.get(timeout=0.1)
            except queue.Empty:
                continue
            self._send(event)

    def _send(self, event: DecodeAccess | PrefillAccess) -> None:
        fields: Any = event.encode()
        entry_bytes = sum(len(value) for value in fields.values() if isinstance(value, bytes))
        maxlen = redis_schema.access_stream_maxlen(entry_bytes + 256)
        try:
            self._redis.xadd(self._stream, fields, maxlen=maxlen, approximate=True)
        except redis.RedisError as error:
            self.num_dropped += 1
            if self._connected:
                logger.warning("evidence dropped", extra={"reason": str(error)})
            self._connected = False
            self._stopping.wait(_RETRY_S)
            return
        self._connected = True
        self.num_sent += 1
