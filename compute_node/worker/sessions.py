"""The streams of main nodes that are open, and the connections that belong to them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from compute_node.worker.direct_way import DirectWay
from proto import errors
from proto.direct_socket import SESSION_BYTES

NewWay = Callable[[threading.Event], DirectWay]
"""Given what is set once the stream has ended."""


class Sessions:
    """Any thread. A stream has at most one connection, which ends with it."""

    def __init__(self) -> None:
        self._gone: dict[bytes, threading.Event] = {}
        self._ways: dict[bytes, DirectWay] = {}
        self._lock = threading.Lock()

    def begin(self, session: bytes, gone: threading.Event) -> None:
        """Raises InvalidRequest for a name that is no secret, or another stream's."""
        with self._lock:
            if len(session) != SESSION_BYTES or session in self._gone:
                raise errors.InvalidRequest(f"a session is {SESSION_BYTES} random bytes")
            self._gone[session] = gone

    def end(self, session: bytes) -> None:
        """Of a stream; one that never began is none."""
        with self._lock:
            self._gone.pop(session, None)
            way = self._ways.pop(session, None)
        if way is not None:
            way.hang_up()

    def take_in(self, session: bytes, new_way: NewWay) -> bool:
        """Open a way for the stream; False: there is none without one."""
        with self._lock:
            gone = self._gone.get(session)
            if gone is None or session in self._ways:
                return False
            way = self._ways[session] = new_way(gone)
        way.open()
        return True
