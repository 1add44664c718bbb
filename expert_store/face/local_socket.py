"""The short way for nodes on this host: the session's messages over a Unix socket that keeps
message boundaries.

A miss wakes one thread here, one that reads, and the node; no event loop is on the way.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from google.protobuf.message import DecodeError

from expert_store.face.exchange import is_acknowledged, perform
from expert_store.store.leases import to_detail
from expert_store.store.sessions import Session
from expert_store.store.store import ExpertStore
from proto import errors
from proto import expert_store_pb2 as pb
from proto.rpc import LOCAL_MESSAGE_BYTES

logger = logging.getLogger(__name__)

_LEASES_A_MESSAGE = 512
_BACKLOG = 64


class LocalSocket:
    """Listens at `path` for the block; its owner alone may connect."""

    def __init__(self, path: Path, store: ExpertStore) -> None:
        self.path = path
        self._store = store
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._callers: set[_Caller] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="local-socket")

    def __enter__(self) -> LocalSocket:
        """Raises ConfigInvalid when the address cannot be bound."""
        self.path.unlink(missing_ok=True)
        try:
            self._listener.bind(str(self.path))
        except OSError as error:
            self._listener.close()
            raise errors.ConfigInvalid(f"cannot listen on {self.path}: {error}") from error
        self.path.chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            callers = list(self._callers)
        for caller in callers:
            caller.hang_up()
            caller.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # shut down
                return
            caller = _Caller(connection, self._store, self._forget)
            with self._lock:
                self._callers.add(caller)
            caller.start()

    def _forget(self, caller: _Caller) -> None:
        with self._lock:
            self._callers.discard(caller)


class _Caller(threading.Thread):
    """One node's connection. Its end does not end the session: the stream's does."""

    def __init__(
        self, connection: socket.socket, store: ExpertStore, forget: Callable[..., None]
    ) -> None:
        super().__init__(name="local-caller")
        self._connection = connection
        self._store = store
        self._forget = forget
        self._sending = threading.Lock()
        self._buffer = bytearray(LOCAL_MESSAGE_BYTES)

    def run(self) -> None:
        try:
            self._serve()
        except errors.FlashMoEError as error:
            self._send(pb.Exchanged(error=to_detail(error)))
        except OSError as error:
            logger.warning("local socket broken", extra={"reason": str(error)})
        finally:
            with self._sending:  # a thread that sends must not meet the next owner of this number
                self._connection.close()
            self._forget(self)

    def hang_up(self) -> None:
        """From any thread: the node hears of it, and `run` ends."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has hung up itself

    def _serve(self) -> None:
        session = self._store.sessions.find(self._receive().decode(errors="replace"))
        while data := self._receive():
            try:
                exchange = pb.Exchange.FromString(data)
            except DecodeError as error:
                raise errors.InvalidRequest(f"not an exchange: {error}") from error
            self._perform(session, exchange)

    def _receive(self) -> bytes:
        """Empty when the node hung up. Raises InvalidRequest for a message that is too long."""
        length, _, flags, _ = self._connection.recvmsg_into([self._buffer])
        if flags & socket.MSG_TRUNC:
            raise errors.InvalidRequest(f"a message exceeds {LOCAL_MESSAGE_BYTES} bytes")
        return bytes(memoryview(self._buffer)[:length])

    def _perform(self, session: Session, exchange: pb.Exchange) -> None:
        def deliver(leases: list[pb.Lease]) -> None:
            for start in range(0, len(leases), _LEASES_A_MESSAGE):
                part = leases[start : start + _LEASES_A_MESSAGE]
                self._send(pb.Exchanged(exchange_id=exchange.exchange_id, leases=part))

        acquire = partial(self._store.acquire, session, deliver=deliver)
        perform(self._store, session, exchange, acquire)
        if is_acknowledged(exchange):
            self._send(pb.Exchanged(exchange_id=exchange.exchange_id))

    def _send(self, message: pb.Exchanged) -> None:
        """Never waits: a node that does not listen is hung up on, its stream tells its fate. One
        that hung up gets no answer: a read that it asked for may end after it.
        """
        try:
            with self._sending:
                if self._connection.fileno() >= 0:
                    self._connection.send(message.SerializeToString(), socket.MSG_DONTWAIT)
        except OSError as error:
            logger.warning("local socket broken", extra={"reason": str(error)})
            self.hang_up()
