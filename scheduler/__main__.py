"""The scheduler daemon: learns from evidence which experts will be wanted again, and advises."""

from __future__ import annotations

from proto.process import last_words

if __name__ == "__main__":
    last_words.report_failed_imports("scheduler")

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Before numpy is loaded: products this small gain nothing from a second thread, and waiting for one
# took most of a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from proto import rpc
from proto.process import daemon
from scheduler.config import SchedulerConfig
from scheduler.daemon import service
from scheduler.daemon.access_stream import AccessStream
from scheduler.daemon.loop import SchedulerLoop
from scheduler.daemon.members import Members
from scheduler.daemon.publisher import Publisher
from scheduler.daemon.scorer import Scorer
from scheduler.daemon.service import SchedulerService
from scheduler.daemon.snapshot import SnapshotFile
from scheduler.learn.forecaster import Forecaster
from scheduler.shadow.advisor import Advisor

REDIS_TIMEOUT_S = 2.0


async def run(config: SchedulerConfig) -> None:
    """The order of lines is the order of start, reversed for stop."""
    os.nice(config.niceness)
    forecaster = load_forecaster(config)
    scorer = Scorer(config, forecaster)
    members = Members(config, scorer, forecaster)
    advisor = Advisor(members.names, members.of, config.shadow_half_life_steps, config.policy)
    snapshot = SnapshotFile(config.snapshot_path, config.fingerprint, config.snapshot_interval_s)
    snapshot.restore(scorer.model)
    async with connected(config) as redis:
        stream = AccessStream(
            redis,
            config.fingerprint,
            config.consumer,
            block_s=config.read_block_s,
            claim_idle_s=config.claim_idle_s,
            reconnect_max_s=config.reconnect_max_s,
        )
        publisher = Publisher(redis, config.fingerprint, config.advice_lifetime_s)
        loop = SchedulerLoop(config, stream, scorer, advisor, publisher, snapshot)
        servicer = SchedulerService(scorer, loop.snapshot, config.horizon_steps)
        with daemon.serving_metrics(loop.snapshot, config.metrics_port, config.metrics_port_file):
            await serve(config, servicer, loop)


def load_forecaster(config: SchedulerConfig) -> Forecaster | None:
    """What `flashmoe calibrate` made, if anything. Raises ForecasterInvalid, FileNotFoundError."""
    if config.forecaster_path is None:
        return None
    forecaster = Forecaster.load(config.forecaster_path)
    forecaster.spec.check_fits(
        config.forecaster_path,
        config.fingerprint,
        (config.num_layers, config.num_experts),
        config.half_lives_tokens,
    )
    return forecaster


async def serve(config: SchedulerConfig, servicer: SchedulerService, loop: SchedulerLoop) -> None:
    """Until a signal, or a defect ends the loop, which is raised."""
    async with (
        rpc.serving(
            config.listen, servicer.register, (service.NAME,), config.stop_grace_s
        ) as health,
        health.learning(loop.obstacle),
        loop.running() as learning,
    ):
        signalled = asyncio.create_task(rpc.until_signalled())
        await asyncio.wait((learning, signalled), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        await health.set(serving=False)


@asynccontextmanager
async def connected(config: SchedulerConfig) -> AsyncIterator[Redis]:
    """A client that never retries by itself: the loop counts and waits, in one place."""
    redis = Redis.from_url(
        config.redis_url,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        socket_timeout=REDIS_TIMEOUT_S + config.read_block_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    try:
        yield redis
    finally:
        await redis.aclose()


def main() -> int:
    return daemon.main("scheduler", __doc__ or "", SchedulerConfig.load, run)


if __name__ == "__main__":
    daemon.leave(main())
