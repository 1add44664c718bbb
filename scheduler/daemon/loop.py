"""The loop of the scheduler: read evidence, learn, publish advice, keep a snapshot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from proto import errors
from proto.redis_schema import DecodeAccess, PrefillAccess
from scheduler.config import SchedulerConfig
from scheduler.daemon.access_stream import AccessStream, RawEntry
from scheduler.daemon.publisher import Publisher
from scheduler.daemon.scorer import Scorer
from scheduler.daemon.snapshot import SnapshotFile
from scheduler.daemon.stats import SchedulerStats
from scheduler.shadow.advisor import Advisor

STEP_MS_WEIGHT = 0.02  # of the newest event in the decayed mean


class SchedulerLoop:
    """Runs until `stop`. A dead Redis or a damaged entry is counted and survived."""

    def __init__(
        self,
        config: SchedulerConfig,
        stream: AccessStream,
        scorer: Scorer,
        advisor: Advisor,
        publisher: Publisher,
        snapshot: SnapshotFile,
    ) -> None:
        self._config = config
        self._stream = stream
        self._scorer = scorer
        self._advisor = advisor
        self._publisher = publisher
        self._snapshot = snapshot
        self._stopping = asyncio.Event()
        self._unpublished: set[str] = set()
        self._publish_due_s = 0.0
        self._events_foreign = 0
        self._shadow_steps_skipped = 0
        self._evidence_lag_s: float | None = None
        self._step_ms = 0.0
        self._started_s = time.monotonic()
        self._started_cpu_s = time.process_time()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Run beside the block; at its end finish the current batch and save."""
        task = asyncio.create_task(self.run())
        try:
            yield task
        finally:
            self.stop()
            await task

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        while not self._stopping.is_set():
            await self._turn()
        await self._snapshot.save(self._scorer.model)

    async def _turn(self) -> None:
        entries = await self._stream.read()
        if entries:
            await self._handle(entries)
        else:
            await self._publish_what_waits()
        if self._snapshot.is_due(time.monotonic()):
            await self._snapshot.save(self._scorer.model)
        if self._stream.backoff_s:
            await self._pause(self._stream.backoff_s)

    async def _handle(self, entries: Sequence[RawEntry]) -> None:
        began_s = time.perf_counter()
        events = self._stream.decode(entries)
        for backlog, event in zip(range(len(events) - 1, -1, -1), events, strict=True):
            self._observe(event, learn=backlog < self._config.learn_backlog_events)
            await asyncio.sleep(0)  # a long batch must not keep callers waiting
        await self._publish()
        await self._stream.ack(entries)
        self._measure(events, (time.perf_counter() - began_s) * 1000)

    def _observe(self, event: DecodeAccess | PrefillAccess, *, learn: bool) -> None:
        try:
            self._advisor.check(event)  # before anything is learned from it
            self._scorer.observe(event, learn=learn)
            if isinstance(event, DecodeAccess):
                self._follow(event, in_full=learn)
        except errors.MessageInvalid:
            self._events_foreign += 1
            return
        self._unpublished.add(event.node)

    def _follow(self, event: DecodeAccess, *, in_full: bool) -> None:
        """The shadows' step; a backlog is not worth theirs either."""
        self._advisor.keep(self._scorer.nodes)
        if in_full:
            self._advisor.observe(event)
        else:
            self._shadow_steps_skipped += 1

    async def _publish_what_waits(self) -> None:
        """What came too soon after the last advice, and what would expire though nothing is new."""
        if self._stream.connected and self._publisher.needs_refresh:
            self._unpublished.update(self._scorer.nodes)
        await self._publish()

    async def _publish(self) -> None:
        now_s = time.monotonic()
        if now_s < self._publish_due_s:
            return
        self._publish_due_s = now_s + self._config.advice_min_interval_s
        for node in self._unpublished.intersection(self._scorer.nodes):
            await self._publisher.publish(node, self._advisor.advise(node))
        self._unpublished.clear()

    def _measure(self, events: Sequence[DecodeAccess | PrefillAccess], batch_ms: float) -> None:
        for _ in events:
            weight = max(STEP_MS_WEIGHT, 1 / max(1, self._scorer.events_seen))
            self._step_ms += weight * (batch_ms / len(events) - self._step_ms)
        if events:
            self._evidence_lag_s = max(0, time.time_ns() - events[-1].time_ns) / 1e9

    async def _pause(self, pause_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    def stats(self) -> SchedulerStats:
        stream, scorer, model = self._stream, self._scorer, self._scorer.model
        return SchedulerStats(
            events_seen=scorer.events_seen,
            events_rejected=stream.entries_rejected + self._events_foreign,
            events_lost=stream.entries_lost,
            events_claimed=stream.entries_claimed,
            steps_missed=scorer.steps_missed,
            lessons_skipped=scorer.lessons_skipped,
            nodes_dropped=scorer.nodes_dropped,
            labels_learned=model.labels_learned,
            drifts=model.drifts,
            advice_published=self._publisher.advice_published,
            advice_failed=self._publisher.advice_failed,
            read_failures=stream.read_failures,
            groups_created=stream.groups_created,
            snapshots=self._snapshot.saved,
            snapshots_failed=self._snapshot.failed,
            snapshots_damaged=self._snapshot.damaged,
            log_loss=model.log_loss,
            baseline_log_loss=model.baseline_log_loss,
            nodes=self._advisor.reports(),
            shadow_steps_skipped=self._shadow_steps_skipped,
            shadow_restarts=self._advisor.restarts,
            redis_connected=stream.connected,
            learning_obstacle=self.obstacle(),
            advice_version=self._publisher.version,
            advice_age_s=self._publisher.age_s,
            evidence_lag_s=self._evidence_lag_s,
            step_ms=self._step_ms,
            cpu_share=self._cpu_share(),
        )

    def obstacle(self) -> str:
        """Why nothing is learned or advised now; empty when all is well."""
        return self._stream.obstacle or self._publisher.obstacle

    def _cpu_share(self) -> float:
        elapsed_s = time.monotonic() - self._started_s
        return (time.process_time() - self._started_cpu_s) / max(elapsed_s, 1e-9)
