"""One client's connection: bounded time for what it sends and takes, a bounded number of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 32 * 1024
_PIECE_BYTES = 4 * 1024  # how far headers may pass their bound


@dataclass(frozen=True)
class Patience:
    """header_s: until a request's headers have come

    body_s:          until the rest of a body has come that is answered already
    send_s:          until a client takes something of what it is sent
    max_connections: as soon as there are as many, the one closes that has waited longest for the
                     end of a request's headers
    """

    header_s: float
    body_s: float
    send_s: float
    max_connections: int


class Connection(H11Protocol):
    """uvicorn's, which by itself waits for all of these for ever, and does not count connections
    that have sent no request.

    patience: set in the class that a server uses
    """

    patience: Patience
    _since_s: float  # when it began to wait for headers
    _incoming: asyncio.TimerHandle | None = None
    _outgoing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # what the kernel does not take holds answers up
        self._since_s = self.loop.time()
        if len(self.connections) >= self.patience.max_connections:
            self._make_room()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_incoming()
        self._forget_outgoing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Headers go in by small pieces: h11 looks at their length only between two of them."""
        at = 0
        while at < len(data) and not self.transport.is_closing():
            end = at + _PIECE_BYTES if self._waits_for_headers else len(data)
            super().data_received(data[at:end])
            at = end
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since_s = self.loop.time()
        if self._waits_for_rest_of_body:
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._outgoing = self.loop.call_later(self.patience.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget_outgoing()
        super().resume_writing()

    @property
    def _waits_for_headers(self) -> bool:
        return self.conn.their_state is h11.IDLE

    @property
    def _waits_for_rest_of_body(self) -> bool:
        is_answered = self.cycle is not None and self.cycle.response_complete
        return is_answered and self.conn.their_state is h11.SEND_BODY

    def _make_room(self) -> None:
        opened = [one for one in self.connections if not one.transport.is_closing()]
        waiting = [
            one
            for one in opened
            if one is not self and isinstance(one, Connection) and one._waits_for_headers
        ]
        if len(opened) >= self.patience.max_connections and waiting:
            min(waiting, key=lambda one: one._since_s).transport.close()

    def _watch(self) -> None:
        """A watch that runs already goes on: a byte now and then gives no more time."""
        if not (self._waits_for_headers or self._waits_for_rest_of_body):
            self._forget_incoming()
        elif self._incoming is None:
            patience = self.patience
            within_s = patience.header_s if self._waits_for_headers else patience.body_s
            self._incoming = self.loop.call_later(within_s, self._close_if_it_waits)

    def _close_if_it_waits(self) -> None:
        self._incoming = None
        is_waiting = self._waits_for_headers or self._waits_for_rest_of_body
        if is_waiting and not self.transport.is_closing():
            self.transport.close()

    def _forget_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.cancel()
            self._incoming = None

    def _forget_outgoing(self) -> None:
        if self._outgoing is not None:
            self._outgoing.cancel()
            self._outgoing = None
