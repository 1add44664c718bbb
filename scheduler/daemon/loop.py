"""The loop of the scheduler: read evidence, learn, publish advice, keep a snapshot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from proto import errors, stats
from proto import stats_pb2 as pb
from proto.access import DecodeAccess, PrefillAccess
from proto.stats import counter, fact, gauge
from scheduler.config import SchedulerConfig
from scheduler.daemon.access_stream import AccessStream, RawEntry
from scheduler.daemon.publisher import Publisher
from scheduler.daemon.scorer import Scorer
from scheduler.daemon.snapshot import SnapshotFile
from scheduler.shadow.advisor import Advisor

STEP_WEIGHT = 0.02  # of the newest event in the decayed mean


class SchedulerLoop:
    """Runs until `stop`. A dead Redis or a damaged entry is counted and survived.

    shadow_steps_skipped: decode steps of a backlog that no shadow followed
    evidence_lag_s: by the wall clock; None before any evidence
    """

    shadow_steps_skipped: int = counter(
        "flashmoe_scheduler_shadow_steps_skipped", "shadow steps skipped"
    )
    evidence_lag_s: float | None = gauge(
        "flashmoe_scheduler_evidence_lag_seconds",
        "from a node's writing to our publication",
        start=None,
    )
    step_s: float = gauge(
        "flashmoe_scheduler_step_seconds",
        "one event from decode to publication, decayed mean",
        start=0.0,
    )

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
        self._measure(events, time.perf_counter() - began_s)

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
            self.shadow_steps_skipped += 1

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

    def _measure(self, events: Sequence[DecodeAccess | PrefillAccess], batch_s: float) -> None:
        for _ in events:
            weight = max(STEP_WEIGHT, 1 / max(1, self._scorer.events_seen))
            self.step_s += weight * (batch_s / len(events) - self.step_s)
        if events:
            self.evidence_lag_s = max(0, time.time_ns() - events[-1].time_ns) / 1e9

    async def _pause(self, pause_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    def snapshot(self) -> pb.Snapshot:
        """What the daemon shows of itself now."""
        return stats.snapshot(
            self,
            self._stream,
            self._scorer,
            self._scorer.model,
            self._publisher,
            self._snapshot,
            self._advisor,
            *(source for report in self._advisor.reports() for source in report.sources()),
        )

    @property
    @counter("flashmoe_scheduler_events_rejected", "events rejected")
    def events_rejected(self) -> int:
        """Those that could not be decoded, and another model's."""
        return self._stream.entries_rejected + self._events_foreign

    @property
    @fact("why nothing is learned or advised now; empty: all is well")
    def learning_obstacle(self) -> str:
        return self.obstacle()

    @property
    @gauge("flashmoe_scheduler_learning", "1 while evidence comes and advice leaves")
    def is_learning(self) -> bool:
        return not self.obstacle()

    def obstacle(self) -> str:
        """Why nothing is learned or advised now; empty when all is well."""
        return self._stream.obstacle or self._publisher.obstacle

    @property
    @gauge("flashmoe_scheduler_cpu_ratio", "of one core, since start")
    def cpu_share(self) -> float:
        elapsed_s = time.monotonic() - self._started_s
        return (time.process_time() - self._started_cpu_s) / max(elapsed_s, 1e-9)
