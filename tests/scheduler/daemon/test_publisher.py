from __future__ import annotations

import numpy as np
import pytest
from redis.asyncio import Redis

from proto import redis_schema
from proto.redis_schema import Advice
from scheduler.config import SchedulerConfig
from scheduler.daemon.publisher import Publisher
from scheduler.shadow.advisor import Verdict

LOCAL = Verdict("decayed", None)
NOW_NS = 5_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns


async def read(redis: Redis, config: SchedulerConfig, node: str) -> Advice:
    data = await redis.get(redis_schema.advice_key(config.fingerprint, node))
    return Advice.decode(data)


async def test_advice_arrives_with_version_time_and_lifetime(
    redis: Redis, config: SchedulerConfig
) -> None:
    """Red when the key outlives the advice, or two publications have one version."""
    publisher = Publisher(redis, config.fingerprint, 4.0, time_ns=Clock())
    scores = np.array([[0.25, 0.5]], np.float32)
    await publisher.publish("a", Verdict("river", scores))
    first = await read(redis, config, "a")
    await publisher.publish("a", LOCAL)
    second = await read(redis, config, "a")
    assert first.scores is not None
    assert first.scores.tolist() == scores.tolist()
    assert (first.policy, first.time_ns, first.lifetime_s) == ("river", NOW_NS, 4.0)
    assert (second.policy, second.scores, second.version) == ("decayed", None, first.version + 1)
    assert publisher.advice_published == 2
    assert 0 < await redis.pttl(redis_schema.advice_key(config.fingerprint, "a")) <= 4000


async def test_versions_grow_across_a_restart(redis: Redis, config: SchedulerConfig) -> None:
    """Red when a fresh publisher begins at zero: readers would keep the old advice."""
    clock = Clock()
    old = Publisher(redis, config.fingerprint, 4.0, time_ns=clock)
    await old.publish("a", LOCAL)
    clock.now_ns += 1_000_000_000
    assert Publisher(redis, config.fingerprint, 4.0, time_ns=clock).version > old.version


async def test_knows_the_age_of_its_advice(redis: Redis, config: SchedulerConfig) -> None:
    """Red when advice is refreshed only after it has expired."""
    clock = Clock()
    publisher = Publisher(redis, config.fingerprint, 4.0, time_ns=clock)
    assert (publisher.age_s, publisher.needs_refresh) == (None, False)
    await publisher.publish("a", LOCAL)
    clock.now_ns += 1_900_000_000
    assert (publisher.age_s, publisher.needs_refresh) == (pytest.approx(1.9), False)
    clock.now_ns += 200_000_000
    assert publisher.needs_refresh


async def test_a_failure_is_counted_not_raised() -> None:
    """Red when the error leaves, or the version of advice nobody got is used up."""
    async with Redis.from_url("unix:///nowhere.sock") as away:
        publisher = Publisher(away, "f", 4.0, time_ns=Clock())
        before = publisher.version
        await publisher.publish("a", LOCAL)
    assert (publisher.advice_failed, publisher.advice_published) == (1, 0)
    assert (publisher.version, publisher.age_s) == (before, None)
    assert "nowhere.sock" in publisher.obstacle
