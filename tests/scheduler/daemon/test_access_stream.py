from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from proto import redis_schema
from scheduler.config import SchedulerConfig
from scheduler.daemon.access_stream import AccessStream
from tests.scheduler.traces import decode_step

GROUP = redis_schema.SCHEDULER_GROUP


def reader(
    redis: Redis, config: SchedulerConfig, consumer: str = "one", **changes: Any
) -> AccessStream:
    settings = {"block_s": 0.02, "claim_idle_s": 60.0, "reconnect_max_s": 0.2, **changes}
    return AccessStream(redis, config.fingerprint, consumer, **settings)


async def add(redis: Redis, config: SchedulerConfig, *steps: int) -> None:
    for step in steps:
        event = decode_step([[0, 1], [2, 3]], step=step)
        await redis.xadd(redis_schema.access_stream(config.fingerprint), event.encode())


def steps(stream: AccessStream, entries: Any) -> list[int]:
    return [getattr(event, "step", -1) for event in stream.decode(entries)]


async def num_pending(redis: Redis, config: SchedulerConfig) -> int:
    key = redis_schema.access_stream(config.fingerprint)
    return int((await redis.xpending(key, GROUP))["pending"])


async def test_reads_what_was_there_before_and_what_comes(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red when the group starts at the stream's end, or nothing is acknowledged."""
    await add(redis, config, 1, 2)
    stream = reader(redis, config)
    entries = await stream.read()
    assert steps(stream, entries) == [1, 2]
    await stream.ack(entries)
    assert await num_pending(redis, config) == 0
    await add(redis, config, 3)
    assert steps(stream, await stream.read()) == [3]
    assert stream.connected and stream.obstacle == ""


async def test_a_restart_takes_up_its_own_unacknowledged_entries_first(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red when only new entries are read."""
    await add(redis, config, 1)
    await reader(redis, config).read()
    await add(redis, config, 2)
    stream = reader(redis, config)
    entries = await stream.read()
    assert steps(stream, entries) == [1]
    await stream.ack(entries)
    assert steps(stream, await stream.read()) == [2]


async def test_takes_over_from_a_dead_consumer_and_counts(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red without XAUTOCLAIM, or when it is asked at every read."""
    await add(redis, config, 1)
    await reader(redis, config, "dead").read()
    now_s = [0.0]
    stream = reader(redis, config, claim_idle_s=0.001, clock=lambda: now_s[0])
    now_s[0] = 0.001
    entries: list[Any] = []
    while not entries:  # the dead one's entry must have been idle for a millisecond
        now_s[0] += 0.001
        entries = await stream.read()
    assert steps(stream, entries) == [1]
    assert stream.entries_claimed == 1
    await stream.ack(entries)
    assert await stream.read() == []
    await add(redis, config, 2)
    await reader(redis, config, "dead").read()
    assert [await stream.read(), await stream.read()] == [[], []]
    assert stream.entries_claimed == 1


async def test_what_cannot_be_decoded_is_counted_and_acknowledged(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red when the error leaves, or the entry stays pending and comes for ever."""
    await redis.xadd(redis_schema.access_stream(config.fingerprint), {"kind": "nonsense"})
    await add(redis, config, 1)
    stream = reader(redis, config)
    entries = await stream.read()
    assert steps(stream, entries) == [1]
    assert stream.entries_rejected == 1
    await stream.ack(entries)
    assert await num_pending(redis, config) == 0


async def test_an_entry_trimmed_while_pending_counts_as_lost(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red when an entry without fields breaks the decoder."""
    await add(redis, config, 1)
    await reader(redis, config).read()
    await redis.xtrim(redis_schema.access_stream(config.fingerprint), maxlen=0)
    stream = reader(redis, config)
    entries = await stream.read()
    assert len(entries) == 1
    assert stream.decode(entries) == []
    assert (stream.entries_lost, stream.entries_rejected) == (1, 0)


async def test_a_lost_group_is_made_again(redis: Redis, config: SchedulerConfig) -> None:
    """What a Valkey restart leaves: no stream, no group. Red when NOGROUP counts as Redis away."""
    stream = reader(redis, config)
    await stream.read()
    await redis.delete(redis_schema.access_stream(config.fingerprint))
    await add(redis, config, 7)
    assert await stream.read() == []
    assert stream.backoff_s == 0
    assert steps(stream, await stream.read()) == [7]
    assert stream.groups_created == 2
    assert stream.read_failures == 0


async def test_a_key_of_another_type_is_counted_not_raised(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red when only connection errors are caught."""
    await redis.set(redis_schema.access_stream(config.fingerprint), b"a string")
    stream = reader(redis, config)
    assert await stream.read() == []
    assert (stream.read_failures, stream.connected) == (1, False)


async def test_waits_longer_each_time_redis_is_away_up_to_a_cap(
    config: SchedulerConfig,
) -> None:
    """Red when the wait does not grow, or has no cap, or a failed ack is raised."""
    async with Redis.from_url("unix:///nowhere.sock") as away:
        stream = reader(away, config)
        waits = []
        for _ in range(4):
            assert await stream.read() == []
            waits.append(stream.backoff_s)
        await stream.ack([(b"1-1", {})])
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.2])
    assert (stream.read_failures, stream.connected) == (5, False)
    assert "nowhere.sock" in stream.obstacle
