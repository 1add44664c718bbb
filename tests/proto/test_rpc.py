"""Both ends of a real connection.

Planted faults seen red: the interceptor guarding unary calls alone, details not cut to what fits a
trailer, any file removed for a dead socket, health left SERVING while draining, check_exposure
passing `0.0.0.0`, client certificates not required, 50 ms for an attempt to connect, a socket's
path given to gRPC as it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from proto import errors, rpc
from proto.errors import KINDS
from proto.rpc import Listen, TlsFiles
from tests.daemons import CuttableProxy
from tests.ports import free_port

NAME, DEADLINE_S = "flashmoe.v1.ExpertStore", 10.0
LONG = "é" * 40_000


def raising(request: bytes) -> errors.FlashMoEError:
    kind, message = request.decode().split(":")
    return KINDS[kind](message)


async def raise_unary(request: bytes, context: Any) -> bytes:
    raise raising(request)


async def raise_late(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    raise raising(request)


async def raise_in_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield b"first"
        raise raising(request)


def register(server: grpc.aio.Server) -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(raise_unary),
        "Late": grpc.unary_stream_rpc_method_handler(raise_late),
        "Stream": grpc.stream_stream_rpc_method_handler(raise_in_stream),
    }
    generic = grpc.method_handlers_generic_handler("test.Raiser", handlers)
    server.add_generic_rpc_handlers((generic,))


def serve(
    address: str, tls: TlsFiles | None = None, drain: Callable[[], None] = lambda: None
) -> AbstractAsyncContextManager[rpc.Health]:
    return rpc.serving(Listen(address, tls), register, [NAME], grace_s=1.0, drain=drain)


async def call(channel: grpc.aio.Channel, method: str, request: bytes) -> errors.FlashMoEError:
    path = f"/test.Raiser/{method}"
    try:
        if method == "Unary":
            await channel.unary_unary(path)(request, timeout=DEADLINE_S)
        elif method == "Late":
            assert [part async for part in channel.unary_stream(path)(request)] == []
        else:
            stream = channel.stream_stream(path)(iter([request]), timeout=DEADLINE_S)
            assert [part async for part in stream] == []
    except grpc.RpcError as error:
        return errors.from_rpc(error)
    raise AssertionError("the call did not fail")


@pytest.mark.parametrize("method", ["Unary", "Late", "Stream"])
async def test_every_kind_survives_the_wire(method: str, run_dir: Path) -> None:
    address = f"unix:{run_dir}/s"
    async with serve(address), rpc.connect_aio(address) as channel:
        for name, kind in KINDS.items():
            found = await call(channel, method, f"{name}:what went wrong".encode())
            assert (type(found), str(found)) == (kind, "what went wrong")


@pytest.mark.parametrize("method", ["Unary", "Late", "Stream"])
async def test_a_message_too_long_for_a_trailer_keeps_its_kind(method: str, run_dir: Path) -> None:
    """Red without the cut: the client sees RESOURCE_EXHAUSTED, so a bad request gets retried."""
    address = f"unix:{run_dir}/s"
    async with serve(address), rpc.connect_aio(address) as channel:
        found = await call(channel, method, f"UnknownExpert:{LONG}".encode())
    assert type(found) is errors.UnknownExpert
    assert str(found)
    assert LONG.startswith(str(found))


async def health_of(channel: grpc.aio.Channel, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    return reply.status


@pytest.mark.parametrize("service", ["", NAME])
async def test_health_is_per_service(service: str, run_dir: Path) -> None:
    address = f"unix:{run_dir}/s"
    async with serve(address) as health, rpc.connect_aio(address) as channel:
        assert await health_of(channel, service) == rpc.SERVING
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            await health_of(channel, "no.such.Service")
        await health.set(serving=False)
        assert await health_of(channel, service) == rpc.NOT_SERVING


async def test_health_turns_before_work_is_drained(run_dir: Path) -> None:
    """Red when `drain` is called first: a new call could still be routed to a stopping daemon."""
    seen: list[bool] = []
    async with serve(f"unix:{run_dir}/s", drain=lambda: seen.append(is_serving())) as health:

        def is_serving() -> bool:
            return health.servicer._server_status[NAME] == rpc.SERVING

        assert is_serving()
    assert seen == [False]


async def test_a_server_that_is_slow_to_answer_is_waited_for(run_dir: Path) -> None:
    """On a busy box a daemon may need more than a moment to say that it is there."""
    address, busy = run_dir / "s", run_dir / "busy"
    proxy = CuttableProxy(busy, address, accepting=False)
    async with serve(f"unix:{address}"):
        with rpc.connect(f"unix:{busy}") as channel, ThreadPoolExecutor() as threads:
            check = health_pb2_grpc.HealthStub(channel).Check
            asked = threads.submit(check, health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            done, _ = await asyncio.to_thread(wait, [asked], 0.5)
            assert not done, "an attempt that had not failed was given up"
            proxy.accept()
            assert (await asyncio.wrap_future(asked)).status == rpc.SERVING
            proxy.close()


async def test_reflection_lists_the_services(run_dir: Path) -> None:
    address = f"unix:{run_dir}/s"
    async with serve(address), rpc.connect_aio(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([request]), timeout=DEADLINE_S):
            names = {service.name for service in reply.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("unix:/run/s", True),
        ("unix-abstract:s", True),
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.1:1", False),
        ("localhost.example.com:1", False),
        ("127.0.0.1.example.com:1", False),
        ("store:1", False),
    ],
)
async def test_only_loopback_may_go_without_tls(address: str, loopback: bool) -> None:
    assert rpc.is_loopback(address) == loopback
    if loopback:
        rpc.check_exposure(Listen(address))
        return
    with pytest.raises(errors.ConfigInvalid, match="other hosts"):
        async with serve(address):
            pass
    rpc.check_exposure(Listen(address, insecure=True))


async def test_a_second_server_is_told_of_the_first(run_dir: Path) -> None:
    address = f"unix:{run_dir}/s"
    async with serve(address), rpc.connect_aio(address) as channel:
        with pytest.raises(errors.AlreadyRunning, match="stop it first"):
            async with serve(address):
                pass
        assert await health_of(channel, NAME) == rpc.SERVING


async def test_a_dead_daemons_socket_is_cleared(run_dir: Path) -> None:
    path = run_dir / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    async with serve(f"unix:{path}"), rpc.connect_aio(f"unix:{path}") as channel:
        assert await health_of(channel, NAME) == rpc.SERVING
        assert path.stat().st_mode & 0o077 == 0, "a socket is its owner's alone"


async def test_a_file_that_is_no_socket_stays(run_dir: Path) -> None:
    """Red without the check: a file refuses a connection like a dead socket, and was removed."""
    path = run_dir / "notes.txt"
    path.write_text("mine")
    with pytest.raises(errors.ConfigInvalid, match="not a socket"):
        async with serve(f"unix:{path}"):
            pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["#", "?x", "%", "%20", " ", "é漢字", "\t", "\n", ";=&+[]{}", "a:b"]
)
async def test_a_socket_may_have_any_name_but_a_comma(name: str, run_dir: Path) -> None:
    """Red where gRPC reads the path as part of a URI: it served at another path, or at none."""
    path = run_dir / f"a{name}b"
    async with serve(f"unix:{path}"), rpc.connect_aio(f"unix:{path}") as channel:
        assert await health_of(channel, NAME) == rpc.SERVING
        assert path.is_socket()
    with pytest.raises(errors.ConfigInvalid, match="comma"):
        rpc.connect(f"unix:{path},")


@pytest.mark.parametrize("address", ["unix:/no/such/folder/s", "unix:/tmp/" + "x" * 200])
async def test_an_address_that_cannot_be_had_is_named(address: str) -> None:
    with pytest.raises(errors.ConfigInvalid, match="cannot listen"):
        async with serve(address):
            pass


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.ConfigInvalid, match="cannot listen"):
            async with serve(f"127.0.0.1:{taken.getsockname()[1]}"):
                pass


async def test_mutual_tls_admits_only_our_own(tls: dict[str, TlsFiles]) -> None:
    address = f"localhost:{free_port()}"
    async with serve(address, tls["server"]):
        async with rpc.connect_aio(address, tls["client"]) as channel:
            assert await health_of(channel, NAME) == rpc.SERVING
        for credentials in (None, tls["stranger"]):
            async with rpc.connect_aio(address, credentials) as channel:
                with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                    await health_of(channel, NAME)


async def test_a_client_refuses_a_server_of_another_authority(tls: dict[str, TlsFiles]) -> None:
    address = f"localhost:{free_port()}"
    async with (
        serve(address, tls["stranger"].model_copy(update={"ca": None})),
        rpc.connect_aio(address, tls["client"]) as channel,
    ):
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            await health_of(channel, NAME)


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
async def test_a_missing_certificate_is_named(missing: str, tls: dict[str, TlsFiles]) -> None:
    files = tls["server"].model_copy(update={missing: Path("no-such.pem")})
    with pytest.raises(errors.ConfigInvalid, match=r"no-such\.pem"):
        async with serve("localhost:0", files):
            pass
    with pytest.raises(errors.ConfigInvalid, match=r"no-such\.pem"):
        rpc.connect("localhost:1", files)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_ends_the_wait(number: signal.Signals) -> None:
    waiting = asyncio.create_task(rpc.until_signalled())
    await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    await asyncio.wait_for(waiting, DEADLINE_S)
    for installed in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(installed)
