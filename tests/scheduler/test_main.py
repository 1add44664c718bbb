"""The daemon as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import tomli_w
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis

from proto import redis_schema, rpc
from proto import scheduler_pb2 as pb
from proto import stats_pb2 as stats_pb
from proto.expert import ExpertKey
from proto.redis_schema import Advice
from proto.scheduler_pb2_grpc import SchedulerStub
from proto.stats import Stats
from scheduler.__main__ import run
from scheduler.config import SchedulerConfig
from scheduler.daemon import service, snapshot
from scheduler.daemon.loop import SchedulerLoop
from scheduler.daemon.scorer import Scorer
from tests.scheduler.conftest import start_valkey
from tests.scheduler.traces import structured_trace

pytestmark = pytest.mark.system

DEADLINE_S = 30


def write_config(directory: Path, **changes: object) -> Path:
    table = {
        "address": f"unix:{directory}/scheduler.sock",
        "redis_url": f"unix://{directory}/valkey.sock",
        "fingerprint": "f",
        "moe_layers": [1, 3],
        "num_experts": 8,
        "horizon_steps": 4,
        "snapshot_path": f"{directory}/learner.npz",
        "metrics_port": 0,
        "metrics_port_file": f"{directory}/metrics.port",
        **changes,
    }
    path = directory / "flashmoe.toml"
    path.write_text(tomli_w.dumps({"scheduler": table}))
    return path


@contextmanager
def daemon(config: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "scheduler", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_serves_learns_and_leaves_with_a_snapshot(run_dir: Path) -> None:
    """Red when health is never SERVING, when SIGTERM kills, or when nothing is saved."""
    server = start_valkey(run_dir)
    with (
        daemon(write_config(run_dir)) as process,
        rpc.connect(f"unix:{run_dir}/scheduler.sock") as channel,
        Redis(unix_socket_path=str(run_dir / "valkey.sock")) as redis,
    ):
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service.NAME),
            wait_for_ready=True,
            timeout=DEADLINE_S,
        )
        assert health.status == rpc.SERVING
        for event in structured_trace(50):
            redis.xadd(redis_schema.access_stream("f"), event.encode())
        stub = SchedulerStub(channel)
        while Stats.from_pb(stub.Stats(stats_pb.StatsRequest())).events_seen < 50:
            assert process.poll() is None
        key = ExpertKey(3, 1)
        assert 0 <= stub.Explain(pb.ExplainRequest(key=key.to_pb())).score <= 1
        assert Advice.decode(redis.get(redis_schema.advice_key("f", "node-a"))).lifetime_s == 5
        port = (run_dir / "metrics.port").read_text().strip()
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            assert b"flashmoe_scheduler_events_seen_total 50.0" in reply.read()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=DEADLINE_S)
    server.stop()
    assert process.returncode == 0, log
    assert (run_dir / "learner.npz").exists()
    assert "stop requested" in [json.loads(line)["message"] for line in log.splitlines()]


def test_takes_up_its_snapshot_and_serves_though_redis_is_down(run_dir: Path) -> None:
    """Degraded, not down. Red when health follows Redis, a waiting daemon ignores SIGTERM, or
    what was learned is left behind.
    """
    path = write_config(run_dir)
    scorer = Scorer(SchedulerConfig.load(path))
    for event in structured_trace(20):
        scorer.observe(event)
    snapshot.save(run_dir / "learner.npz", "f", scorer.model.state())
    with (
        daemon(path) as process,
        rpc.connect(f"unix:{run_dir}/scheduler.sock") as channel,
    ):
        snapshot_now = SchedulerStub(channel).Stats(
            stats_pb.StatsRequest(), wait_for_ready=True, timeout=DEADLINE_S
        )
        stats = Stats.from_pb(snapshot_now)
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=DEADLINE_S)
    assert health.status == rpc.SERVING
    assert not stats.redis_connected
    assert stats.labels_learned == scorer.model.labels_learned > 0
    assert process.returncode == 0, log


async def test_a_defect_in_the_loop_ends_the_daemon(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the daemon goes on serving without learning."""

    async def broken(self: SchedulerLoop) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(SchedulerLoop, "_turn", broken)
    config = SchedulerConfig.load(write_config(run_dir))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(run(config), DEADLINE_S)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"horizon_stepps": 3}, "unknown key 'horizon_stepps'"),
        ({"address": "0.0.0.0:1234"}, "set tls, or insecure = true"),
    ],
)
def test_a_fault_at_start_is_one_sentence_and_exit_2(
    run_dir: Path, changes: dict[str, object], named: str
) -> None:
    """Red when the daemon ends with a traceback."""
    with daemon(write_config(run_dir, **changes)) as process:
        _, errors_said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    sentence = errors_said.splitlines()[-1]
    assert sentence.startswith("scheduler: ")
    assert named in sentence
    assert "Traceback" not in errors_said


def test_numpy_multiplies_in_one_thread() -> None:
    """Red without the limit, or when something loads numpy before it: on two cores the forecaster's
    products kept both busy.
    """
    program = (
        "import os, scheduler.__main__, numpy; numpy.ones((512, 512)) @ numpy.ones((512, 512));"
        "print(len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1\n"
