"""HTTP in the event loop of the daemon: bounded connections, headers that must come in time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from compute_node.gateway.config import GatewayConfig
from compute_node.gateway.host_port import HostPort
from proto import errors

_MAX_HEADER_BYTES = 32 * 1024
_BACKLOG = 512


class TimedProtocol(H11Protocol):
    """Closes a connection whose request has begun, or has not, and whose headers do not end in
    time: uvicorn waits for these for ever.
    """

    header_timeout_s = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Signals are the daemon's own affair."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(http: HostPort) -> socket.socket:
    """Raises ConfigInvalid when the address cannot be bound."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    # asyncio lets small events go at once only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(http)
    except OSError as error:
        listener.close()
        raise errors.ConfigInvalid(
            f"--http {http} cannot be bound ({error.strerror}): give another, as --http 8001"
        ) from error
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def serving(app: Any, config: GatewayConfig) -> AsyncIterator[HostPort]:
    """HTTP for the block; afterwards answers under way have stop_grace_s. Yields where.

    Raises ConfigInvalid when the address cannot be bound.
    """
    listener = bind(HostPort.parse(config.http))
    where = HostPort(*listener.getsockname()[:2])
    protocol = type("Protocol", (TimedProtocol,), {"header_timeout_s": config.header_timeout_s})
    server = _Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=round(config.keep_alive_s),
            timeout_graceful_shutdown=round(config.stop_grace_s),
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if config.http_port_file is not None:
        _write_port(config.http_port_file, where)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield where
    finally:
        server.should_exit = True
        await task


def _write_port(file: Path, where: HostPort) -> None:
    """For who gave port 0. Raises ConfigInvalid."""
    try:
        file.write_text(f"{where}\n")
    except OSError as error:
        raise errors.ConfigInvalid(f"{file} cannot be written ({error.strerror})") from error
