"""Bytes that are no message, to every kind of method; and methods that write instead of yielding.

Planted faults seen red: gRPC decodes (UNKNOWN and a traceback each), streams or unary requests left
to gRPC alone, a stream's second request not decoded, gRPC's own health `Watch` iterated.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto import errors, rpc
from proto.expert_pb2 import ExpertKey
from proto.rpc import Listen

NAME, DEADLINE_S = "test.Echo", 10.0
SOUND = ExpertKey(layer=3, expert=7).SerializeToString()
NO_MESSAGES = (b"\xff", b"\x08", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200)


async def answer_one(request: ExpertKey, context: Any) -> ExpertKey:
    return request


async def answer_last(requests: AsyncIterator[ExpertKey], context: Any) -> ExpertKey:
    return [request async for request in requests][-1]


async def answer_twice(request: ExpertKey, context: Any) -> AsyncIterator[ExpertKey]:
    yield request
    yield request


async def answer_each(requests: AsyncIterator[ExpertKey], context: Any) -> AsyncIterator[ExpertKey]:
    async for request in requests:
        yield request


def register(server: grpc.aio.Server) -> None:
    codec: Any = {
        "request_deserializer": ExpertKey.FromString,
        "response_serializer": ExpertKey.SerializeToString,
    }
    handlers = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(answer_one, **codec),
        "stream_unary": grpc.stream_unary_rpc_method_handler(answer_last, **codec),
        "unary_stream": grpc.unary_stream_rpc_method_handler(answer_twice, **codec),
        "stream_stream": grpc.stream_stream_rpc_method_handler(answer_each, **codec),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


async def said(channel: grpc.aio.Channel, kind: str, *requests: bytes) -> list[bytes]:
    """What comes back. Streams say all requests, others the last one."""
    method = getattr(channel, kind)(f"/{NAME}/{kind}")
    call = method(iter(requests) if kind.startswith("stream") else requests[-1], timeout=DEADLINE_S)
    if kind.endswith("unary"):
        return [await call]
    return [reply async for reply in call]


@pytest.mark.parametrize("kind", ["unary_unary", "stream_unary", "unary_stream", "stream_stream"])
async def test_bytes_that_are_no_message_are_the_callers_fault(
    kind: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{run_dir}/s"
    async with (
        rpc.serving(Listen(address), register, [NAME], grace_s=1.0),
        rpc.connect_aio(address) as channel,
    ):
        for data in NO_MESSAGES:
            with pytest.raises(grpc.RpcError) as caught:
                await said(channel, kind, SOUND, data)
            found = errors.from_rpc(caught.value)
            assert type(found) is errors.InvalidRequest and f"/{NAME}/{kind}" in str(found)
        assert set(await said(channel, kind, SOUND)) == {SOUND}
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.message for record in told] == ["undecodable request"] * len(NO_MESSAGES)
    assert not any(record.exc_info for record in told)


async def test_health_can_be_watched(run_dir: Path) -> None:
    address = f"unix:{run_dir}/s"
    async with (
        rpc.serving(Listen(address), register, [NAME], grace_s=1.0) as health,
        rpc.connect_aio(address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=NAME), timeout=DEADLINE_S
        )
        assert (await watch.read()).status == rpc.SERVING
        await health.set(serving=False)
        assert (await watch.read()).status == rpc.NOT_SERVING
        watch.cancel()
