from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from proto import redis_schema
from proto.access import DecodeAccess, PrefillAccess
from proto.redis_schema import Advice
from proto.stats import Stats
from scheduler.__main__ import connected
from scheduler.config import SchedulerConfig
from scheduler.daemon.access_stream import AccessStream
from scheduler.daemon.loop import SchedulerLoop
from scheduler.daemon.members import Members
from scheduler.daemon.publisher import Publisher
from scheduler.daemon.scorer import Scorer
from scheduler.daemon.snapshot import SnapshotFile
from scheduler.shadow.advisor import Advisor
from tests.scheduler.conftest import Until, start_valkey
from tests.scheduler.traces import (
    decode_step,
    on_the_wire,
    prefill,
    small_config,
    structured_trace,
)


@dataclass
class Daemon:
    loop: SchedulerLoop
    scorer: Scorer
    stream: AccessStream
    redis: Redis
    config: SchedulerConfig

    async def send(self, *events: DecodeAccess | PrefillAccess) -> None:
        key = redis_schema.access_stream(self.config.fingerprint)
        async with self.redis.pipeline(transaction=False) as pipe:
            for event in events:
                pipe.xadd(key, event.encode())
            await pipe.execute()

    def stats(self) -> Stats:
        return Stats.from_pb(self.loop.snapshot())

    async def advice(self, node: str = "node-a") -> Advice:
        key = redis_schema.advice_key(self.config.fingerprint, node)
        return Advice.decode(await self.redis.get(key))


def assemble(config: SchedulerConfig, redis: Redis) -> Daemon:
    scorer = Scorer(config)
    members = Members(config, scorer)
    advisor = Advisor(members.names, members.of, config.shadow_half_life_steps, config.policy)
    stream = AccessStream(
        redis,
        config.fingerprint,
        config.consumer,
        block_s=config.read_block_s,
        claim_idle_s=config.claim_idle_s,
        reconnect_max_s=config.reconnect_max_s,
    )
    publisher = Publisher(redis, config.fingerprint, config.advice_lifetime_s)
    snapshot = SnapshotFile(config.snapshot_path, config.fingerprint, config.snapshot_interval_s)
    loop = SchedulerLoop(config, stream, scorer, advisor, publisher, snapshot)
    return Daemon(loop, scorer, stream, redis, config)


@asynccontextmanager
async def running(config: SchedulerConfig) -> AsyncIterator[Daemon]:
    async with connected(config) as redis:
        daemon = assemble(config, redis)
        async with daemon.loop.running():
            yield daemon


async def test_evidence_in_advice_out(config: SchedulerConfig, until: Until) -> None:
    """Red when any link is missing: reading, learning, scoring, publishing, measuring."""
    async with running(config.model_copy(update={"policy": "river"})) as daemon:
        await daemon.send(prefill([[2] * 8] * 2, num_tokens=16))
        await until(lambda: daemon.stats().advice_published == 1)
        early = await daemon.advice()
        for event in structured_trace(100):
            await daemon.send(event)
        await until(lambda: daemon.stats().events_seen == 101)
        published = daemon.stats().advice_published
        await daemon.send(decode_step([[0, 1], [2, 3]], step=100))
        await until(lambda: daemon.stats().advice_published > published)
        late, stats = await daemon.advice(), daemon.stats()
    assert (early.policy, early.scores) == ("decayed", None)
    assert late.policy == "river"
    assert late.scores is not None
    assert late.scores.shape == (2, 8)
    assert late.version == stats.advice_version > early.version
    assert stats.labels_learned > 200
    assert stats.log_loss < stats.baseline_log_loss
    assert 0 < stats.step_s < 1
    assert 0 < stats.cpu_share < 5
    assert stats.advice_age_s is not None
    assert stats.evidence_lag_s is not None
    assert stats.redis_connected
    assert stats.events_rejected == stats.advice_failed == stats.read_failures == 0


async def test_the_shadows_of_a_node_decide_and_are_told(
    config: SchedulerConfig, until: Until
) -> None:
    """A stream that LRU alone can follow. Red when shadows do not step, or the publisher is told
    another name than the one in charge.
    """
    drifting = [
        decode_step([[at % 8, (at + 1) % 8]] * 2, step=step, slots=6)
        for step, at in enumerate(step // 4 for step in range(400))
    ]
    async with running(config) as daemon:
        for start in range(0, len(drifting), 10):
            await daemon.send(*drifting[start : start + 10])
            await until(lambda seen=start: daemon.stats().events_seen >= seen + 10)  # type: ignore[misc]
        [(node, shown)] = daemon.stats().by("node").items()
        hits = {name: found.get("hit_ratio") for name, found in shown.by("policy").items()}
        await until(lambda: daemon.stats().advice_published > 0)
        advice = await daemon.advice()
    assert (node, shown.steps, shown.slots, shown.scope) == ("node-a", 400, 6, "layer")
    assert set(hits) == {"decayed", "lru", "lfru", "river", "min", "actual"}
    assert hits["min"] >= max(hits.values())
    assert hits["actual"] == 0
    assert advice.policy == shown.in_charge
    assert daemon.stats().shadow_steps_skipped == 0


async def test_a_budget_that_cannot_be_is_rejected_before_it_is_learned_from(
    config: SchedulerConfig, until: Until
) -> None:
    async with running(config) as daemon:
        await daemon.send(decode_step([[0, 1], [2, 3]], slots=3), decode_step([[0, 1], [2, 3]]))
        await until(lambda: daemon.stats().advice_published == 1)
        stats = daemon.stats()
    assert (stats.events_seen, stats.events_rejected) == (1, 1)


async def test_each_node_gets_advice_of_its_own(config: SchedulerConfig, until: Until) -> None:
    """Red when one node's advice is written under another's key."""
    async with running(config) as daemon:
        await daemon.send(
            decode_step([[0, 1], [2, 3]], node="a"), decode_step([[0, 1], [2, 3]], node="b")
        )
        await until(lambda: daemon.stats().advice_published == 2)
        assert {(await daemon.advice(node)).policy for node in "ab"} == {"decayed"}


async def test_too_much_evidence_skips_lessons_not_state(
    config: SchedulerConfig, until: Until
) -> None:
    """Red when a backlog is learned in full, or dropped, or advised on event by event."""
    config = config.model_copy(update={"learn_backlog_events": 3})
    async with connected(config) as redis:
        daemon = assemble(config, redis)
        await daemon.send(*structured_trace(40))
        async with daemon.loop.running():
            await until(lambda: daemon.stats().advice_published == 1)
    stats = daemon.stats()
    assert (stats.events_seen, stats.lessons_skipped, stats.advice_published) == (40, 37, 1)
    assert (stats.shadow_steps_skipped, stats.steps) == (37, 3)


async def test_prompts_count_and_anothers_model_is_rejected(
    config: SchedulerConfig, until: Until
) -> None:
    """Red when the scorer's refusal ends the loop."""
    async with running(config) as daemon:
        await daemon.send(decode_step([[0, 1]]), prefill([[2] * 8] * 2, num_tokens=16))
        await until(lambda: daemon.stats().advice_published == 1)
        stats = daemon.stats()
    assert (stats.events_seen, stats.events_rejected) == (1, 1)


async def test_advice_is_kept_fresh_while_nothing_happens(
    config: SchedulerConfig, until: Until
) -> None:
    """Red when the advice of an idle node expires: it would look like a dead scheduler."""
    async with running(config.model_copy(update={"advice_lifetime_s": 0.2})) as daemon:
        await daemon.send(decode_step([[0, 1], [2, 3]]))
        await until(lambda: daemon.stats().advice_published >= 3)
    assert daemon.stats().events_seen == 1


async def test_advice_is_not_written_more_often_than_asked(
    config: SchedulerConfig, until: Until
) -> None:
    """Red when advice_min_interval_s is not looked at, or what waited is forgotten."""
    changes = {"advice_min_interval_s": 0.3, "advice_lifetime_s": 60.0}
    async with running(config.model_copy(update=changes)) as daemon:
        for step in range(20):
            await daemon.send(decode_step([[0, 1], [2, 3]], step=step))
            await until(lambda seen=step: daemon.stats().events_seen > seen)  # type: ignore[misc]
        assert daemon.stats().advice_published <= 2
        published = daemon.stats().advice_published
        await until(lambda: daemon.stats().advice_published == published + 1)


async def test_survives_a_valkey_that_restarts_empty(run_dir: Path, until: Until) -> None:
    """Red when a connection error or the lost group ends the loop, or learning starts anew."""
    config = small_config(redis_url=f"unix://{run_dir}/valkey.sock")
    server = start_valkey(run_dir)
    async with running(config) as daemon:
        try:
            await daemon.send(*structured_trace(20))
            await until(lambda: daemon.stats().events_seen == 20)
            labels = daemon.stats().labels_learned
            server.stop()
            await until(lambda: daemon.stats().read_failures >= 2)
            assert not daemon.stats().redis_connected
            server.start()
            await until(lambda: daemon.stats().redis_connected)
            published = daemon.stats().advice_published
            await daemon.send(*structured_trace(20))
            await until(lambda: daemon.stats().advice_published > published)
            assert await daemon.advice()
            stats = daemon.stats()
        finally:
            daemon.loop.stop()
            server.stop()
    assert stats.groups_created == 2
    assert stats.labels_learned > labels


async def test_starts_before_valkey_does(run_dir: Path, until: Until) -> None:
    """Red when the first connection must succeed."""
    config = small_config(redis_url=f"unix://{run_dir}/valkey.sock")
    async with running(config) as daemon:
        await until(lambda: daemon.stats().read_failures >= 2)
        server = start_valkey(run_dir)
        try:
            await until(lambda: daemon.stats().redis_connected)
            daemon.loop.stop()
        finally:
            server.stop()


async def test_a_last_snapshot_is_written_and_taken_up(
    config: SchedulerConfig, until: Until, tmp_path: Path
) -> None:
    """Red when stopping does not save, or starting does not restore."""
    config = config.model_copy(update={"snapshot_path": tmp_path / "learner.npz"})
    async with running(config) as daemon:
        await daemon.send(*structured_trace(20))
        await until(lambda: daemon.stats().events_seen == 20)
        assert daemon.stats().snapshots == 0
    assert daemon.stats().snapshots == 1
    again = Scorer(config)
    SnapshotFile(config.snapshot_path, config.fingerprint, 30).restore(again.model)
    assert again.model.labels_learned == daemon.scorer.model.labels_learned > 0


async def test_callers_are_answered_during_a_long_batch(config: SchedulerConfig) -> None:
    """Red when a batch is handled without letting the event loop breathe."""
    async with connected(config) as redis:
        daemon = assemble(config, redis)
        seen: list[int] = []

        async def caller() -> None:
            while not seen or seen[-1] < 100:
                seen.append(daemon.scorer.events_seen)
                await asyncio.sleep(0)

        await daemon.send(*structured_trace(100))
        entries = await daemon.stream.read()
        await asyncio.gather(caller(), daemon.loop._handle(entries))
    assert len(set(seen)) > 90


FIELDS = on_the_wire(decode_step([[0, 1], [2, 3]]).encode()) | on_the_wire(
    prefill([[1] * 8] * 2, 4).encode()
)
SHORT = st.binary(max_size=24) | st.integers(-(2**70), 2**70).map(lambda n: str(n).encode())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    entries=st.lists(
        st.dictionaries(st.sampled_from(sorted(FIELDS)), SHORT, min_size=1, max_size=4), max_size=3
    ),
    kind=st.sampled_from([b"decode", b"prefill"]),
)
def test_random_bytes_never_end_the_loop(
    valkey_dir: Path, entries: list[dict[bytes, bytes]], kind: bytes
) -> None:
    """Entries with random bytes in some fields: each is seen or rejected, and good ones count.

    Red when an entry raises anything but MessageInvalid, from decoding to publishing.
    """
    asyncio.run(feed(valkey_dir, [{**FIELDS, b"kind": kind, **changes} for changes in entries]))


async def feed(valkey_dir: Path, entries: list[dict[bytes, bytes]]) -> None:
    fingerprint = uuid4().hex
    config = small_config(redis_url=f"unix://{valkey_dir}/valkey.sock", fingerprint=fingerprint)
    async with connected(config) as redis:
        daemon = assemble(config, redis)
        key = redis_schema.access_stream(fingerprint)
        for fields in entries:
            await redis.xadd(key, dict(fields))
        await daemon.send(decode_step([[0, 1], [2, 3]]))
        while daemon.stats().advice_published == 0:
            await daemon.loop._turn()
        stats = daemon.stats()
        await redis.delete(key)
    assert stats.events_seen + stats.events_rejected == len(entries) + 1
    assert stats.events_seen >= 1
