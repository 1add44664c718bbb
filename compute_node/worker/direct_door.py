"""Where main nodes connect for short messages, which go straight to the compute thread."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from proto import direct_socket, errors
from proto.direct_socket import DirectSocket
from proto.rpc import Listen

logger = logging.getLogger(__name__)

_HANDSHAKES = 4  # at once

TakeIn = Callable[[DirectSocket, bytes], bool]
"""Given a connection and the session that it names; whether there is such a stream."""


class DirectDoor:
    """Listens at the host of `listen` for the block. Raises ConfigInvalid when it cannot.

    port: 0 is any
    """

    def __init__(self, listen: Listen, port: int, take_in: TakeIn) -> None:
        self._listener = direct_socket.listen(listen.address, port)
        self.port: int = self._listener.getsockname()[1]
        self._tls, self._take_in = listen.tls, take_in
        self._handshakes = ThreadPoolExecutor(_HANDSHAKES, "direct-handshake")
        self._thread = threading.Thread(target=self._accept, name="direct-door")

    def __enter__(self) -> DirectDoor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._handshakes.shutdown()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:  # shut down
                return
            self._handshakes.submit(self._let_in, connection, address)

    def _let_in(self, connection: socket.socket, address: object) -> None:
        try:
            found, session = direct_socket.accepted(connection, self._tls)
        except errors.Unavailable as error:
            facts = {"from": str(address), "reason": str(error)}
            logger.warning("connection refused", extra=facts)
            return
        if not self._take_in(found, session):
            logger.warning("connection of no stream", extra={"from": str(address)})
            found.close()
