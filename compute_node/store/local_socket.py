"""The short way to a store on this host: a session's exchanges over a Unix socket that keeps
message boundaries.
"""

from __future__ import annotations

import select
import socket

from proto import errors
from proto import expert_store_pb2 as pb
from proto.rpc import LOCAL_MESSAGE_BYTES


class HungUp(errors.Unavailable):
    """The store closed the local socket: the session is gone, or the store is."""


class LocalSocket:
    """One connection, for one thread. poll_s: the longest that `receive` waits."""

    def __init__(self, path: str, session_id: str, poll_s: float) -> None:
        """Raises Unavailable when nobody answers at `path`."""
        self._buffer = bytearray(LOCAL_MESSAGE_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(poll_s)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        try:
            self._socket.connect(path)
            self._socket.send(session_id.encode())
        except OSError as error:
            self._socket.close()
            raise errors.Unavailable(
                f"nobody answers at the store's local socket {path} ({error.strerror})"
            ) from error

    def send(self, exchange: pb.Exchange) -> None:
        """Raises HungUp, also when the store does not listen; InvalidRequest for a message that is
        too long.
        """
        data = exchange.SerializeToString()
        if len(data) > LOCAL_MESSAGE_BYTES:
            raise errors.InvalidRequest(f"an exchange of {len(data)} bytes: ask for fewer at once")
        try:
            self._socket.send(data)
        except OSError as error:
            raise HungUp(f"the store hung up ({error})") from error

    def receive(self) -> pb.Exchanged | None:
        """The next answer, None after some time without one.

        Raises HungUp, also when the store says that the session is gone, and the error of any other
        refusal, which ends the session too.
        """
        try:
            length = self._socket.recv_into(self._buffer)
        except TimeoutError:
            return None
        except OSError as error:
            raise HungUp(f"the store hung up ({error})") from error
        if length == 0:
            raise HungUp("the store hung up")
        reply = pb.Exchanged.FromString(bytes(memoryview(self._buffer)[:length]))
        if reply.HasField("error"):
            problem = errors.from_kind(reply.error.kind, reply.error.message)
            if isinstance(problem, errors.Unavailable):
                raise HungUp(str(problem))
            raise problem
        return reply

    def has_message(self) -> bool:
        """Whether `receive` would return or raise at once."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        self._socket.close()
