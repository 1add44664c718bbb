"""One record on its way into memory: who waits for it, and how far its reads are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from expert_store.io.device import Request
from expert_store.manifest.extents import ExpertRecord
from expert_store.store.assembly import Assembly
from expert_store.store.sessions import Session
from expert_store.store.slots import Part
from proto import errors
from proto import expert_store_pb2 as pb

Deliver = Callable[[list[pb.Lease]], None]
Turn = tuple[int, int]
NOW: Turn = (0, 0)


class Priority(IntEnum):
    """Who waits. A lower number goes first."""

    DEMAND = 0
    PREFETCH = 1
    REFILL = 2


@dataclass(eq=False)
class Fill:
    """Single flight: a session that wants the record meanwhile waits for this one.

    turn:    among fills of one priority, what sorts first goes first
    waiters: sessions that acquired it, each with what delivers its lease
    wishers: sessions that prefetched it
    part, view, assembly: from its first read on
    ahead_bytes: asked of the device while it was a prefetch
    """

    record: ExpertRecord
    priority: Priority
    turn: Turn = NOW
    waiters: list[tuple[Session, Deliver]] = field(default_factory=list)
    wishers: set[Session] = field(default_factory=set)
    part: Part | None = None
    view: memoryview | None = None
    assembly: Assembly | None = None
    num_issued: int = 0
    ahead_bytes: int = 0
    num_in_flight: int = 0
    is_withdrawn: bool = False
    error: errors.FlashMoEError | None = None
    start_ns: int = 0
    arrived_ns: int = 0

    @property
    def is_issued(self) -> bool:
        """No piece of it will be read that is not being read."""
        if self.is_withdrawn or self.error is not None:
            return True
        return self.assembly is not None and self.num_issued == len(self.assembly.pieces)

    @property
    def is_over(self) -> bool:
        """It failed or was withdrawn, and no read writes into its memory any more."""
        return (self.is_withdrawn or self.error is not None) and self.num_in_flight == 0

    @property
    def issued_bytes(self) -> int:
        if self.assembly is None:
            return 0
        return sum(piece.needed_bytes for piece in self.assembly.pieces[: self.num_issued])

    def next_read(self) -> PieceRead:
        """The read of its next piece, which counts as in flight from now on."""
        assert self.assembly is not None and self.view is not None
        piece = self.assembly.pieces[self.num_issued]
        self.num_issued += 1
        self.num_in_flight += 1
        if self.priority is Priority.PREFETCH:
            self.ahead_bytes += piece.needed_bytes
        return PieceRead(
            piece.file,
            piece.offset_bytes,
            self.view,
            piece.landing_bytes,
            piece.length_bytes,
            piece.needed_bytes,
            self,
            self.num_issued - 1,
        )


@dataclass(frozen=True, slots=True, eq=False)
class PieceRead(Request):
    """The read of piece `number` of a fill."""

    fill: Fill
    number: int
