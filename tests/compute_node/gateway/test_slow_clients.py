"""Clients that send or read slowly, too much, or nothing: bounded time, memory and number.

Planted faults seen red: headers without a time limit, or fed to h11 in one piece; the rest of a
refused body read for ever; no time limit for readers, or the kernel's default buffer for them; no
room made by half-open connections, or made by answers under way.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compute_node.client.async_client import AsyncNodeClient
from compute_node.gateway.app import new_app
from compute_node.gateway.bodies import Bodies
from compute_node.gateway.config import GatewayConfig
from compute_node.gateway.desk import Desk
from compute_node.gateway.event_stream import EventStream
from compute_node.gateway.host_port import HostPort
from compute_node.gateway.node import Node
from compute_node.gateway.server import serving
from compute_node.gateway.stats import GatewayStats

PATIENCE_S = 0.4  # for headers, bodies and readers alike
SOON_S = 5.0  # a busy machine's share; what is not bounded takes for ever
MOST_CONNECTIONS, MOST_BODY_BYTES = 8, 100_000
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
EVENT = "data: " + "x" * 1000 + "\n\n"


@dataclass
class Streams:
    """An application of endless streams, as answers are sent. num_sent: events of all"""

    num_open: int = 0
    num_sent: int = 0
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_open += 1
        await EventStream(self._events(), lambda failure: "", lambda: None, self._close)(
            scope, receive, send
        )

    async def _events(self) -> AsyncGenerator[str, None]:
        while True:
            self.num_sent += 1
            yield EVENT
            await asyncio.sleep(0)

    async def _close(self) -> None:
        self.num_open -= 1
        if self.num_open == 0:
            self.all_closed.set()


def config(run_dir: Path) -> GatewayConfig:
    return GatewayConfig(
        address=f"unix:{run_dir}/gateway.sock",
        http="127.0.0.1:0",
        node_address=f"unix:{run_dir}/node.sock",
        max_connections=MOST_CONNECTIONS,
        max_body_bytes=MOST_BODY_BYTES,
        header_timeout_s=PATIENCE_S,
        body_timeout_s=PATIENCE_S,
        send_timeout_s=PATIENCE_S,
        stop_grace_s=1.0,
    )


@pytest.fixture
def bodies() -> Bodies:
    return Bodies(MOST_BODY_BYTES, PATIENCE_S)


@pytest.fixture
async def gateway(run_dir: Path, bodies: Bodies) -> AsyncIterator[HostPort]:
    """The whole of it, before a node that is not there."""
    settings = config(run_dir)
    async with AsyncNodeClient(settings.node_address) as client:
        desk = Desk(Node(client, "m"), bodies, GatewayStats())
        async with serving(new_app(desk, settings, []), settings) as where:
            yield where


@pytest.fixture
async def streams() -> Streams:
    return Streams()


@pytest.fixture
async def streaming(run_dir: Path, streams: Streams) -> AsyncIterator[HostPort]:
    async with serving(streams, config(run_dir)) as where:
        yield where


class Client:
    """What a client sends, byte by byte as it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def dribble(self, data: bytes) -> None:
        """The same again and again, until the other end closes."""
        while True:
            self._writer.write(data)
            await self._writer.drain()
            await asyncio.sleep(0.02)

    async def heard(self) -> bytes:
        """All that is sent until the other end closes."""
        found = b""
        async with asyncio.timeout(SOON_S):
            with suppress(ConnectionResetError):
                while data := await self._reader.read(1 << 16):
                    found += data
        return found

    @property
    def is_closed(self) -> bool:
        return self._reader.at_eof()

    async def status(self) -> bytes:
        async with asyncio.timeout(SOON_S):
            return (await self._reader.readline()).split()[1]


@asynccontextmanager
async def connected(where: HostPort) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(*where)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def heard_while_dribbling(where: HostPort, begin: bytes, data: bytes) -> bytes:
    """What a client hears until the connection closes, though it goes on sending."""
    async with connected(where) as client:
        client.send(begin)
        dribbling = asyncio.create_task(client.dribble(data))
        try:
            return await client.heard()
        finally:
            dribbling.cancel()
            await asyncio.wait([dribbling])


@pytest.mark.parametrize("begin", [b"", b"GET / HT", HEAD, HEAD + b"X-A: "])
async def test_headers_that_do_not_end(gateway: HostPort, begin: bytes) -> None:
    async with connected(gateway) as client:
        client.send(begin)
        assert await client.heard() == b""
    if begin:
        assert await heard_while_dribbling(gateway, begin, b"x") == b""


@pytest.mark.parametrize("num_lines", [5_000, 10_000, 200_000])
async def test_header_lines_without_end(
    streaming: HostPort, streams: Streams, num_lines: int
) -> None:
    """In one piece: h11 looks at their length only where they are not whole."""
    async with connected(streaming) as client:
        client.send(HEAD + b"a: bcde\r\n" * num_lines + b"\r\n")
        assert await client.status() == b"400"
        await client.heard()
    assert streams.num_sent == 0


@pytest.mark.parametrize("length", [b"Content-Length: 90000", b"Transfer-Encoding: chunked"])
async def test_a_slow_body(gateway: HostPort, bodies: Bodies, length: bytes) -> None:
    """It is answered, and does not go on being read after that."""
    answer = await heard_while_dribbling(gateway, HEAD + length + b"\r\n\r\n", b"1\r\nx\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within 0.4 s" in answer
    assert bodies.held_bytes == 0


async def test_a_body_that_stops(gateway: HostPort, bodies: Bodies) -> None:
    async with connected(gateway) as client:
        client.send(HEAD + b"Content-Length: 90000\r\n\r\n" + b"x" * 70_000)
        assert (await client.heard()).startswith(b"HTTP/1.1 408 ")
    assert bodies.held_bytes == 0


@pytest.mark.parametrize("length", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_is_too_long(gateway: HostPort, bodies: Bodies, length: bytes) -> None:
    chunk = b"ea60\r\n" + b"x" * 60_000 + b"\r\n"
    answer = await heard_while_dribbling(gateway, HEAD + length + b"\r\n\r\n", chunk)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert bodies.held_bytes == 0


async def test_a_body_that_nobody_wants(gateway: HostPort) -> None:
    """No such path: it is refused before its body has come, which is not read for ever."""
    begin = b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
    answer = await heard_while_dribbling(gateway, begin, b"x")
    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_a_reader_that_stops(streaming: HostPort, streams: Streams) -> None:
    """What the kernel does not take is not made, and its place is given back."""
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, streaming)
        await loop.sock_sendall(deaf, HEAD + b"\r\n")
        async with asyncio.timeout(SOON_S):
            await streams.all_closed.wait()
    assert streams.num_sent * len(EVENT) < 1024 * 1024


async def test_half_open_connections_do_not_keep_others_out(gateway: HostPort) -> None:
    """The one that has waited longest goes, and the others stay."""
    num_half_open = 5 * MOST_CONNECTIONS
    async with AsyncExitStack() as stack:
        half_open = [
            await stack.enter_async_context(connected(gateway)) for _ in range(num_half_open)
        ]
        client = await stack.enter_async_context(connected(gateway))
        client.send(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await client.status() == b"200"
        num_closed = sum(one.is_closed for one in half_open)
    assert num_closed == num_half_open - (MOST_CONNECTIONS - 2)


async def test_answers_under_way_are_not_closed_for_newcomers(
    streaming: HostPort, streams: Streams
) -> None:
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(connected(streaming))
            for _ in range(MOST_CONNECTIONS - 1)
        ]
        for client in opened:
            client.send(HEAD + b"\r\n")
            assert await client.status() == b"200"
        for _ in range(3):
            async with connected(streaming) as newcomer:
                newcomer.send(HEAD + b"\r\n")
                assert await newcomer.status() == b"503"
        assert streams.num_open == MOST_CONNECTIONS - 1
