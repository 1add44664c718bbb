"""The short way between a main node and a worker: the messages of their stream, over a TCP socket
of its own, each after its length. No event loop and no thread is between the two that compute.

The stream stays open: it is the life of both. What is larger than a message may be here goes over
the stream.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Iterator

from proto import errors, rpc

MESSAGE_BYTES = 512 * 1024
SESSION_BYTES = 16  # a secret that the main node chose says to which stream a connection belongs
HELLO_S = 5.0  # from the connection to the end of its first message

_LENGTH = struct.Struct("<I")
_BUFFER_BYTES = 4 * MESSAGE_BYTES
_CHUNK_BYTES = 256 * 1024
_SEND_S = 0.2  # one that does not read for so long is hung up on
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class DirectSocket:
    """One end of a connection. One thread receives, one at a time sends.

    connection: connected, with its handshake done; it is this object's now
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        connection.setblocking(False)
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Waits for nobody but a peer that has read nothing of half a megabyte, and for that a
        fifth of a second. Raises Unavailable when it hung up or does not read, InvalidRequest for
        a message that is too long.
        """
        if len(message) > MESSAGE_BYTES:
            raise errors.InvalidRequest(f"{len(message)} bytes exceed {MESSAGE_BYTES}")
        left = memoryview(_LENGTH.pack(len(message)) + message)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except _LATER:
                if not select.select([], [self._socket], [], _SEND_S)[1]:
                    raise errors.Unavailable("the other box does not read") from None
            except (OSError, ValueError) as error:
                raise errors.Unavailable(f"the other box hung up ({error})") from error

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to receive by then."""
        return bool(self._poll.poll(max(0.0, 1e3 * timeout_s)))

    def receive(self) -> Iterator[bytes]:
        """The messages that are here in whole; waits for none.

        Raises Unavailable once the peer hung up, MessageInvalid for one that is too long.
        """
        self._take_in()
        while (message := self._next()) is not None:
            yield message

    def hang_up(self) -> None:
        """From any thread: both ends hear of it. `close` is the receiver's."""
        try:
            # Not TLS's own, by which a thread that receives would read what is encrypted.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            return  # it has hung up itself

    def close(self) -> None:
        self._socket.close()

    def _next(self) -> bytes | None:
        """The first message of what came; None: it is not here in whole."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MESSAGE_BYTES:
            raise errors.MessageInvalid(
                f"the other box sent {length} bytes, more than {MESSAGE_BYTES}"
            )
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(memoryview(self._buffer)[_LENGTH.size : end])
        del self._buffer[:end]
        return message

    def _take_in(self) -> None:
        """No more than the longest message and what came with its end. What is left can be waited
        for, because TLS hands out whole records.
        """
        num = _CHUNK_BYTES
        while num == _CHUNK_BYTES and len(self._buffer) < _LENGTH.size + MESSAGE_BYTES:
            try:
                part = self._socket.recv(_CHUNK_BYTES)
            except _LATER:
                return
            except (OSError, ValueError) as error:
                raise errors.Unavailable(f"the other box hung up ({error})") from error
            if not part:
                raise errors.Unavailable("the other box hung up")
            self._buffer += part
            num = len(part)


def listen(address: str, port: int) -> socket.socket:
    """At the host of `address` alone, which is host:port; port: 0 is any. Raises ConfigInvalid."""
    host, _ = host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise errors.ConfigInvalid(f"cannot listen on port {port} of {host}: {error}") from error


def connect(address: str, port: int, session: bytes, tls: rpc.TlsFiles | None) -> DirectSocket:
    """To `port` of the host of `address`, as the stream's `session`.

    Raises Unavailable when nobody answers there or one end refuses the other's certificate.
    """
    host, _ = host_and_port(address)
    try:
        connection = socket.create_connection((host, port), HELLO_S)
    except OSError as error:
        raise errors.Unavailable(f"nobody answers at port {port} of {host} ({error})") from error
    try:
        if tls is not None:
            connection = _client_context(tls).wrap_socket(connection, server_hostname=host)
        found = DirectSocket(connection)
        found.send(session)
    except (OSError, errors.FlashMoEError) as error:
        connection.close()
        raise errors.Unavailable(f"port {port} of {host} refuses this box ({error})") from error
    return found


def accepted(connection: socket.socket, tls: rpc.TlsFiles | None) -> tuple[DirectSocket, bytes]:
    """The other end of `connect`, and its session. Blocks for no longer than HELLO_S.

    Raises Unavailable for one that is no main node; the connection is closed then.
    """
    connection.settimeout(HELLO_S)
    try:
        if tls is not None:
            connection = _server_context(tls).wrap_socket(connection, server_side=True)
        found = DirectSocket(connection)
        for _ in range(2):  # the length, and the rest if it comes apart
            if not found.wait(HELLO_S):
                break
            for session in found.receive():
                return found, session
        raise errors.Unavailable("it says nothing")
    except (OSError, errors.FlashMoEError) as error:
        connection.close()
        raise errors.Unavailable(f"not a main node ({error})") from error


def host_and_port(address: str) -> tuple[str, int]:
    """Of host:port. The host of [::1]:9400 is ::1."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _server_context(tls: rpc.TlsFiles) -> ssl.SSLContext:
    """Made for each connection, of the files as they are now. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.cert, tls.key)
    if tls.ca is not None:
        context.load_verify_locations(tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_context(tls: rpc.TlsFiles) -> ssl.SSLContext:
    """As above. Without an authority, the system's are believed. Raises OSError."""
    context = ssl.create_default_context(cafile=tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    return context
