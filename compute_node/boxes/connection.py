"""The connection to another box: a thread that opens a stream to it, and another when it ends."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import grpc

from proto import errors, rpc

logger = logging.getLogger(__name__)

CALL_S = 10.0
_POLL_S = 0.02
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_REFUSALS = (errors.VersionMismatch, errors.OtherBits)


Stub = TypeVar("Stub")
_Stub = TypeVar("_Stub", contravariant=True)


class Serves(Protocol[_Stub]):
    """What the connection is for. Called on its thread."""

    def serve(self, stub: _Stub, /) -> None:
        """One stream, from its beginning to its end, which is an RpcError or FlashMoEError unless
        the box ended it.
        """

    def ended(self) -> None:
        """That stream has ended."""


class BoxConnection(Generic[Stub]):
    """Use as a context manager; it connects in the background. Any thread.

    what: "worker" or "shadow", for the log; new_stub: for calls by a channel
    Raises ConfigInvalid for certificates that cannot be read.
    """

    def __init__(
        self,
        what: str,
        address: str,
        tls: rpc.TlsFiles | None,
        new_stub: Callable[[grpc.Channel], Stub],
        serves: Serves[Stub],
    ) -> None:
        self.address = address
        self.is_up = threading.Event()  # set by `serve` once the box is of use
        self._what, self._tls, self._serves = what, tls, serves
        self._channel, self._new_stub = rpc.connect(address, tls), new_stub
        # Made while the channel is known to be open: gRPC crashes otherwise.
        self._stub = new_stub(self._channel)
        self._refusal: errors.FlashMoEError | None = None
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"{what} {address}", daemon=True)

    def __enter__(self) -> BoxConnection[Stub]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closing.set()
        self._channel.close()
        self._thread.join(CALL_S)

    def wait_up(self, timeout_s: float) -> bool:
        """Whether the box is of use by then. Raises what it is refused for: VersionMismatch,
        OtherBits.
        """
        end_s = time.monotonic() + timeout_s
        while not self.is_up.wait(_POLL_S):
            if self._refusal is not None:
                raise self._refusal
            if time.monotonic() > end_s:
                return False
        return True

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            began_s = time.monotonic()
            try:
                self._serves.serve(self._stub)
                self._refusal = None
            except ValueError:  # a call by a channel that was just closed
                if not self._closing.is_set():
                    raise
            except (grpc.RpcError, errors.FlashMoEError) as error:
                self._refusal = error if isinstance(error, _REFUSALS) else None
                if not self._closing.is_set():
                    facts = {"box": self.address, "reason": _reason(error)}
                    logger.warning(f"{self._what} is away", extra=facts)
            self.is_up.clear()
            self._serves.ended()
            if time.monotonic() - began_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._closing.wait(pause_s)
            self._renew_channel()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _renew_channel(self) -> None:
        """A channel keeps the certificates that it began with. Those that cannot be read now leave
        the former ones.
        """
        if self._tls is None:
            return
        try:
            new = rpc.connect(self.address, self._tls)
        except errors.ConfigInvalid as error:
            facts = {"box": self.address, "reason": str(error)}
            logger.warning("certificates not renewed", extra=facts)
            return
        with self._lock:
            if self._closing.is_set():
                new.close()
                return
            former, self._channel, self._stub = self._channel, new, self._new_stub(new)
        former.close()


@contextmanager
def opened(call: Callable[[Iterator[Any]], Any], requests: queue.SimpleQueue[Any]) -> Iterator[Any]:
    """The replies of a stream, which takes what is put into `requests` until the block is left."""
    replies = call(iter(requests.get, None))
    try:
        yield replies
    finally:
        requests.put(None)
        replies.cancel()


def _reason(error: Exception) -> str:
    return error.details() or str(error.code()) if isinstance(error, grpc.Call) else str(error)
