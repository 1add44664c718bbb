"""Both ends of a connection: options, TLS, health, reflection, drain, protocol version."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import BaseModel, ConfigDict

from proto import errors
from proto.interceptor import ErrorInterceptor

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
LOCAL_MESSAGE_BYTES = 128 * 1024

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# A client that pings faster than the server allows is cut off, so both ends read this one list.
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),  # daemons are on this host or beside it: no proxy knows them
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long an attempt may take, not a pause
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class TlsFiles(BaseModel):
    """PEM files of one side. With `ca`, the other side must present a certificate it signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert: Path
    key: Path
    ca: Path | None = None


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """The files are read again at the first handshake after one changed, so that certificates are
    renewed without a restart. If one cannot be read then, the former ones stay in use.

    Raises ConfigInvalid naming the file that cannot be read now.
    """
    seen = _written_ns(tls)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        if (written_ns := _written_ns(tls)) == seen:
            return None
        seen = written_ns
        try:
            return _shown(tls)
        except errors.ConfigInvalid as error:
            logger.warning("certificates not renewed", extra={"reason": str(error)})
            return None

    # The stubs forget that None means no change.
    return grpc.dynamic_ssl_server_credentials(_shown(tls), renewed, tls.ca is not None)  # type: ignore[arg-type]


def _shown(tls: TlsFiles) -> grpc.ServerCertificateConfiguration:
    root = _read_pem(tls.ca) if tls.ca else None
    return grpc.ssl_server_certificate_configuration(
        [(_read_pem(tls.key), _read_pem(tls.cert))], root
    )


def _written_ns(tls: TlsFiles) -> list[int]:
    paths = (path for path in (tls.cert, tls.key, tls.ca) if path is not None and path.exists())
    return [path.stat().st_mtime_ns for path in paths]


def channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Raises ConfigInvalid naming the file that cannot be read."""
    root = _read_pem(tls.ca) if tls.ca else None
    return grpc.ssl_channel_credentials(root, _read_pem(tls.key), _read_pem(tls.cert))


def _read_pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise errors.ConfigInvalid(f"tls: cannot read {path}: {error.strerror}") from error


def to_target(address: str) -> str:
    """As gRPC reads an address: a URI, in which `#`, `?` and `%` of a socket's path mean something.

    Ours are plain: `unix:` and the path as it is, or host:port. Raises ConfigInvalid for a comma.
    """
    if not address.startswith("unix:"):
        return address
    if "," in address:
        raise errors.ConfigInvalid(f"gRPC divides {address} at its comma: give another path")
    return "unix:" + quote(address.removeprefix("unix:"))


def connect(address: str, tls: TlsFiles | None = None) -> grpc.Channel:
    """A channel for a thread that may block."""
    target = to_target(address)
    if tls:
        return grpc.secure_channel(target, channel_credentials(tls), options=CLIENT_OPTIONS)
    return grpc.insecure_channel(target, options=CLIENT_OPTIONS)


def connect_aio(address: str, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """A channel for an event loop."""
    target = to_target(address)
    if tls:
        return grpc.aio.secure_channel(target, channel_credentials(tls), options=CLIENT_OPTIONS)
    return grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS)


@dataclass(frozen=True)
class Listen:
    """Where a daemon listens, and how it is protected there."""

    address: str
    tls: TlsFiles | None = None
    insecure: bool = False


# A health service of node and scheduler beside their own, which serve without learning too.
LEARNING = "flashmoe.v1.Learning"
_LEARNING_POLL_S = 1.0


class Health:
    """Per-service health of one daemon; what is not set is NOT_SERVING."""

    def __init__(self, services: Sequence[str]) -> None:
        self.servicer = health.aio.HealthServicer()
        self._services = ("", *services)

    async def set(self, *, serving: bool) -> None:
        status = SERVING if serving else NOT_SERVING
        for service in self._services:
            await self.servicer.set(service, status)

    @asynccontextmanager
    async def learning(self, obstacle: Callable[[], str]) -> AsyncIterator[None]:
        """LEARNING is SERVING while there is no obstacle, for the block."""
        task = asyncio.create_task(self._follow(obstacle))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            await self.servicer.set(LEARNING, NOT_SERVING)

    async def _follow(self, obstacle: Callable[[], str]) -> None:
        while True:
            await self.servicer.set(LEARNING, NOT_SERVING if obstacle() else SERVING)
            await asyncio.sleep(_LEARNING_POLL_S)


def is_loopback(address: str) -> bool:
    """Whether only this host can reach `address` (unix:..., host:port)."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def check_exposure(listen: Listen) -> None:
    """Refuse to serve other hosts in the clear.

    Raises ConfigInvalid for a bind beyond loopback with neither TLS nor the insecure flag.
    """
    if listen.tls or is_loopback(listen.address):
        return
    if not listen.insecure:
        raise errors.ConfigInvalid(
            f"{listen.address} is reachable from other hosts: set tls, or insecure = true"
        )
    logger.warning("serving without TLS", extra={"address": listen.address})


def check_socket_free(address: str) -> None:
    """Clear a socket file that a dead daemon left.

    Raises AlreadyRunning when somebody answers on it, ConfigInvalid when it is no socket.
    """
    if not address.startswith("unix:"):
        return
    path = Path(address.removeprefix("unix:"))
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):  # a file would refuse the probe too, and be removed
        raise errors.ConfigInvalid(f"{path} exists and is not a socket: give another address")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise errors.AlreadyRunning(f"another daemon answers on {address}: stop it first")


_served: list[str] = []


def has_served() -> bool:
    """Whether this process ever was ready: what ends it afterwards is no fault of its start."""
    return bool(_served)


@asynccontextmanager
async def serving(
    listen: Listen,
    register: Callable[[grpc.aio.Server], None],
    services: Sequence[str],
    grace_s: float,
    drain: Callable[[], None] = lambda: None,
    max_request_bytes: int = MAX_MESSAGE_BYTES,
) -> AsyncIterator[Health]:
    """Serve until the block ends, then turn NOT_SERVING, call `drain`, and let work finish for
    grace_s.

    Raises ConfigInvalid (exposed without TLS, address cannot be bound), AlreadyRunning.
    """
    check_exposure(listen)
    check_socket_free(listen.address)
    server = grpc.aio.server(interceptors=(ErrorInterceptor(max_request_bytes),), options=OPTIONS)
    state = Health(services)
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
    reflection.enable_server_reflection(
        (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    register(server)
    _bind(server, listen)
    await server.start()
    await state.set(serving=True)
    _served.append(listen.address)
    try:
        yield state
    finally:
        await state.set(serving=False)
        drain()
        await server.stop(grace_s)


def _bind(server: grpc.aio.Server, listen: Listen) -> None:
    previous = os.umask(0o177)  # a Unix socket is its owner's alone
    try:
        if listen.tls:
            server.add_secure_port(to_target(listen.address), server_credentials(listen.tls))
        else:
            server.add_insecure_port(to_target(listen.address))
    except RuntimeError as error:
        raise errors.ConfigInvalid(f"cannot listen on {listen.address}: {error}") from error
    finally:
        os.umask(previous)


async def until_signalled() -> None:
    """Return at the first SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    logger.info("stop requested")
