"""A record on its way into a slot: cut into pieces that may be read at once, and hashed in order as
they come.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass

import xxhash

from expert_store.io.device import Request
from expert_store.manifest.extents import ExpertRecord, Extent, plan_reads


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a record that is read by one request.

    offset_bytes:  in the file, on a page
    landing_bytes: in the slot, on a page
    length_bytes:  whole pages
    needed_bytes:  of length_bytes; the file may end after them
    skip_bytes:    before the payload, at the front
    ends:          the extent whose last piece this is
    """

    file: int
    offset_bytes: int
    landing_bytes: int
    length_bytes: int
    needed_bytes: int
    skip_bytes: int
    ends: Extent | None

    def request(self, slot: memoryview) -> Request:
        return Request(
            self.file,
            self.offset_bytes,
            slot,
            self.landing_bytes,
            self.length_bytes,
            self.needed_bytes,
        )


def cut(record: ExpertRecord, piece_bytes: int) -> list[Piece]:
    """The pieces of a record, none longer than `piece_bytes` (whole pages), in their order."""
    pieces = []
    for read in plan_reads(record.extents):
        needed = read.skip_bytes + read.extent.length_bytes
        for start in range(0, needed, piece_bytes):
            length = min(piece_bytes, read.aligned_length_bytes - start)
            is_last = start + piece_bytes >= needed
            pieces.append(
                Piece(
                    read.extent.file,
                    read.aligned_offset_bytes + start,
                    read.landing_bytes + start,
                    length,
                    min(length, needed - start),
                    0 if start else read.skip_bytes,
                    read.extent if is_last else None,
                )
            )
    return pieces


class ChecksumDiffers(Exception):
    """All bytes came, and they are not the record's."""


class Assembly:
    """Pieces of one record arrive in any order, from any thread; the thread that
    brings the next one in order hashes it, and those behind it, while others are being read.
    """

    def __init__(self, record: ExpertRecord, slot: memoryview, piece_bytes: int) -> None:
        self.pieces = cut(record, piece_bytes)
        self._record = record
        self._slot = slot
        self._digest = xxhash.xxh3_64()
        self._came = [False] * len(self.pieces)
        self._next = 0
        self._hashing = False
        self._lock = threading.Lock()

    def arrive(self, number: int) -> bool:
        """Piece `number` is in the slot. True once, for the call that made the record whole: laid
        in place and compared.

        Raises ChecksumDiffers.
        """
        with self._lock:
            self._came[number] = True
            if self._hashing or not self._came[self._next]:
                return False
            self._hashing = True
        while (is_whole := self._take()) is None:
            pass
        if is_whole and self._digest.intdigest() != self._record.checksum:
            raise ChecksumDiffers
        return is_whole

    def _take(self) -> bool | None:
        """Hash the next piece. Returns whether it was the last; None: the next one is here."""
        piece = self.pieces[self._next]
        start, end = (
            piece.landing_bytes + piece.skip_bytes,
            piece.landing_bytes + piece.needed_bytes,
        )
        with self._slot[start:end] as payload:
            self._digest.update(payload)
        if piece.ends is not None:
            arrived = end - piece.ends.length_bytes
            _move(self._slot, piece.ends.place_bytes, arrived, piece.ends.length_bytes)
        with self._lock:
            self._next += 1
            if self._next == len(self.pieces):
                return True
            self._hashing = self._came[self._next]  # else another thread may go on from here
            return None if self._hashing else False


def _move(slot: memoryview, to: int, start: int, length: int) -> None:
    """Overlapping copy towards the front; unlike slice assignment it makes no temporary."""
    if to == start:
        return
    base = ctypes.addressof(ctypes.c_char.from_buffer(slot))
    ctypes.memmove(base + to, base + start, length)
