"""HTTP in the event loop of the daemon."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from compute_node.gateway.config import GatewayConfig
from compute_node.gateway.connection import MAX_HEADER_BYTES, Connection, Patience
from compute_node.gateway.host_port import HostPort
from proto import errors

_BACKLOG = 512
_SEND_BUFFER_BYTES = 128 * 1024


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
        # Of each connection: by default the kernel would hold 2.7 MB for one that stopped reading.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
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
    protocol = type("BoundedConnection", (Connection,), {"patience": _patience(config)})
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
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
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


def _patience(config: GatewayConfig) -> Patience:
    return Patience(
        header_s=config.header_timeout_s,
        body_s=config.body_timeout_s,
        send_s=config.send_timeout_s,
        max_connections=config.max_connections,
    )


def _write_port(file: Path, where: HostPort) -> None:
    """For who gave port 0. Raises ConfigInvalid."""
    try:
        file.write_text(f"{where}\n")
    except OSError as error:
        raise errors.ConfigInvalid(f"{file} cannot be written ({error.strerror})") from error
