"""A channel to another box, made anew for each attempt to connect."""

from __future__ import annotations

import logging
import threading

import grpc

from proto import errors, rpc

logger = logging.getLogger(__name__)


class BoxChannel:
    """With certificates as the files have them at each attempt: a channel keeps those that it began
    with. Raises ConfigInvalid when they cannot be read at first.
    """

    def __init__(self, address: str, tls: rpc.TlsFiles | None) -> None:
        self._address, self._tls = address, tls
        self.now: grpc.Channel = rpc.connect(address, tls)
        self._is_closed, self._lock = False, threading.Lock()

    def renew(self) -> None:
        """What cannot be read leaves the former certificates."""
        if self._tls is None:
            return
        try:
            new = rpc.connect(self._address, self._tls)
        except errors.ConfigInvalid as error:
            facts = {"box": self._address, "reason": str(error)}
            logger.warning("certificates not renewed", extra=facts)
            return
        with self._lock:
            if self._is_closed:
                new.close()
                return
            former, self.now = self.now, new
        former.close()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self.now.close()
