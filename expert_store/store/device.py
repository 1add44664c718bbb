"""What stands between the store and its disk: pieces are asked of it, and readers wait for them."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from expert_store.io.assembly import Piece
from expert_store.store.fills import Fill
from expert_store.store.sessions import Session


@dataclass(frozen=True, slots=True)
class Issued:
    """Piece `number` of a record on its way; its slot stays the reader's until it is done."""

    fill: Fill[Session]
    number: int

    @property
    def piece(self) -> Piece:
        assert self.fill.assembly is not None
        return self.fill.assembly.pieces[self.number]


class Device(Protocol):
    """Takes pieces in the order they are asked for. num_readers: threads that wait for them."""

    num_readers: int

    def submit(self, issued: Sequence[Issued]) -> None:
        """By one thread at a time. Never raises and never waits for the data: what cannot be
        taken comes back with 0 bytes.
        """
        ...

    def wait(self) -> tuple[Issued, int] | None:
        """A piece, and how many of its first bytes are in its slot: the caller reads the rest.
        None: stop.
        """
        ...

    def stop(self) -> None:
        """After the last piece came back: every reader's `wait` ends."""
        ...


class ReadersThemselves:
    """Reads nothing: hands each piece to a reader, which reads it and waits.

    One reader more than the depth: while it hashes, the disk keeps its depth.
    """

    def __init__(self, read_depth: int) -> None:
        self.num_readers = read_depth + 1
        self._issued: queue.SimpleQueue[Issued | None] = queue.SimpleQueue()

    def submit(self, issued: Sequence[Issued]) -> None:
        for item in issued:
            self._issued.put(item)

    def wait(self) -> tuple[Issued, int] | None:
        item = self._issued.get()
        return None if item is None else (item, 0)

    def stop(self) -> None:
        for _ in range(self.num_readers):
            self._issued.put(None)
