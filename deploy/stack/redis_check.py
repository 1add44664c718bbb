"""Checks before a start whether the user's Redis can carry evidence and advice."""

from __future__ import annotations

import re
import uuid

from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from proto import errors, redis_schema

TIMEOUT_S = 3.0
_GROUP, _CONSUMER = redis_schema.SCHEDULER_GROUP, "check"
_LIFETIME_MS = 10_000

# What an error's kind or its text say is in the way, and what helps. The first that fits counts.
_REMEDIES: tuple[tuple[type[Exception] | str, str], ...] = (
    (
        exceptions.AuthenticationError,
        "wants a password: put it into the URL, redis://:PASSWORD@HOST",
    ),
    (
        exceptions.NoPermissionError,
        "does not permit this user what daemons do: allow ~flashmoe:* +@all",
    ),
    (exceptions.OutOfMemoryError, "is full: raise its maxmemory, or free some of it"),
    (exceptions.ReadOnlyError, "is a replica that takes no writes: give its primary"),
    (exceptions.BusyLoadingError, "is still loading its data: start again when it has"),
    ("unknown command", "is too old: Redis 6.2 or Valkey is needed"),
    ("MOVED", "is part of a cluster: give a Redis of its own"),
    ("CLUSTERDOWN", "is part of a cluster: give a Redis of its own"),
    ("MISCONF", "takes no writes: see its log"),
    (exceptions.InvalidResponse, "is no Redis: give the URL of one"),
    (exceptions.TimeoutError, f"does not answer within {TIMEOUT_S:.0f} s: is that a Redis?"),
    (exceptions.ConnectionError, "cannot be reached: start it, or give another URL"),
)


def check_redis(url: str) -> None:
    """Do once what the daemons will do. Leaves nothing in the Redis.

    Raises ConfigInvalid: one sentence with what is wrong and what helps.
    """
    try:
        client = Redis.from_url(
            url,
            socket_connect_timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        raise errors.ConfigInvalid(
            f"--redis {_shown(url)} is no URL of a Redis: {error}"
        ) from error
    with client:
        try:
            _exercise(client)
            _check_room(client, url)
        except (exceptions.RedisError, OSError) as error:
            raise errors.ConfigInvalid(
                f"the Redis at {_shown(url)} {_remedy(error)} ({error}); "
                "without --redis, one of our own is started"
            ) from error


def _exercise(client: Redis) -> None:
    """Send evidence and advice once, over a stream and a key made for the check."""
    stream = f"flashmoe:check:{uuid.uuid4().hex}:access"
    client.ping()
    client.xgroup_create(stream, _GROUP, id="0", mkstream=True)
    try:
        client.pexpire(stream, _LIFETIME_MS)
        entry = client.xadd(stream, {"v": redis_schema.VERSION}, maxlen=64, approximate=True)
        client.xreadgroup(_GROUP, _CONSUMER, {stream: ">"}, count=1)
        client.xautoclaim(stream, _GROUP, _CONSUMER, min_idle_time=0, count=1)
        client.xack(stream, _GROUP, entry)
        client.set(f"{stream}:advice", b"", px=_LIFETIME_MS)
        client.get(f"{stream}:advice")
    finally:
        client.delete(stream, f"{stream}:advice")


def _check_room(client: Redis, url: str) -> None:
    """Raises ConfigInvalid when the stream of evidence could never fit."""
    try:
        memory = client.info("memory")
    except exceptions.NoPermissionError:
        return  # not for us to see: a write that is refused will be counted
    limit_bytes = memory.get("maxmemory", 0)
    if 0 < limit_bytes < redis_schema.ACCESS_STREAM_BYTES:
        raise errors.ConfigInvalid(
            f"the Redis at {_shown(url)} may hold {limit_bytes:,} bytes, evidence alone needs "
            f"{redis_schema.ACCESS_STREAM_BYTES:,}: raise its maxmemory to "
            f"{redis_schema.VALKEY_MAX_MEMORY}"
        )


def _remedy(error: Exception) -> str:
    for sign, remedy in _REMEDIES:
        if sign in str(error) if isinstance(sign, str) else isinstance(error, sign):
            return remedy
    return "refuses what daemons do: give another"


def _shown(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"//.*@", "//", url).partition("?")[0]
