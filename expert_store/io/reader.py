"""Aligned direct reads of pieces of records into slots; every record is verified."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path

from expert_store.io.assembly import Assembly, ChecksumDiffers, Piece
from expert_store.manifest.extents import ExpertRecord
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sources import resolve_inside
from proto import errors
from proto.shm import PAGE_BYTES, align_up

logger = logging.getLogger(__name__)

# What a disk says of bytes that it has lost; anything else may pass.
_LOST = {errno.EIO, errno.EILSEQ, errno.ENODATA, errno.EBADMSG}
PIECE_BYTES = 2 * 1024 * 1024  # measured: tests/bench/LOG.md


class SourceFiles:
    """The store's files, open for direct reads, or for buffered ones that leave no page cache."""

    def __init__(self, paths: list[Path], direct_io: bool, stack: ExitStack) -> None:
        self.paths = paths
        self.direct = direct_io
        self._descriptors: list[int] = []
        for path in paths:
            descriptor = self._open(path)
            stack.callback(os.close, descriptor)
            self._descriptors.append(descriptor)

    def descriptor(self, file: int) -> int:
        return self._descriptors[file]

    def read(self, piece: Piece, slot: memoryview, done_bytes: int = 0) -> None:
        """Fill the landing of `piece`, of which `done_bytes` are there. Raises OSError, and
        EOFError when the file ends before the payload does.
        """
        descriptor = self.descriptor(piece.file)
        done = done_bytes - done_bytes % PAGE_BYTES
        landing, end = piece.landing_bytes, piece.landing_bytes + piece.length_bytes
        while done < piece.needed_bytes:
            # Given back at once: a view kept by an error's traceback keeps the segment mapped.
            with slot[landing + done : end] as rest:
                got = os.preadv(descriptor, [rest], piece.offset_bytes + done)
            if got == 0 or (got % 512 and done + got < piece.needed_bytes):
                raise EOFError(f"the file ends {piece.needed_bytes - done - got} bytes early")
            done += got
        if not self.direct:
            os.posix_fadvise(descriptor, piece.offset_bytes, align_up(done), os.POSIX_FADV_DONTNEED)

    def damaged(self, record: ExpertRecord, file: int, problem: str) -> errors.ExpertDamaged:
        """What to raise when `record` cannot be had whole: names file, expert and remedy."""
        return errors.ExpertDamaged(
            f"expert {record.key} in {self.paths[file]} is damaged ({problem}): "
            "run `flashmoe verify` on the store, restore the file, restart expert_store"
        )

    def _open(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct:
            try:
                return _open_direct(path, flags)
            except OSError as error:
                self.direct = False
                logger.warning(
                    "direct I/O refused, reading through the page cache and dropping it",
                    extra={"file": str(path), "reason": error.strerror},
                )
        descriptor = os.open(path, flags)
        # Read-ahead would cache neighbours that nobody asked for and nobody drops.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor


def _open_direct(path: Path, flags: int) -> int:
    """Raises OSError where direct reads are refused, at open or at the first read."""
    descriptor = os.open(path, flags | os.O_DIRECT)
    try:
        with mmap(-1, PAGE_BYTES) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_piece(
    files: SourceFiles, record: ExpertRecord, piece: Piece, slot: memoryview, done_bytes: int = 0
) -> None:
    """One piece of a record, of which `done_bytes` are there. Raises ExpertDamaged, and
    Unavailable for what may pass, such as a lack of memory.
    """
    try:
        files.read(piece, slot, done_bytes)
    except EOFError as error:
        raise files.damaged(record, piece.file, str(error)) from error
    except OSError as error:
        if error.errno in _LOST:
            raise files.damaged(record, piece.file, str(error)) from error
        path = files.paths[piece.file]
        raise errors.Unavailable(
            f"expert {record.key} in {path} cannot be read now ({error.strerror}): retry"
        ) from error


def add_piece(files: SourceFiles, record: ExpertRecord, assembly: Assembly, number: int) -> bool:
    """A piece that was read goes into its record; whether that made it whole. Raises
    ExpertDamaged.
    """
    try:
        return assembly.arrive(number)
    except ChecksumDiffers:
        problem = "its checksum differs"
        raise files.damaged(record, record.extents[0].file, problem) from None


def read_record(files: SourceFiles, record: ExpertRecord, slot: memoryview) -> None:
    """Read a record into a slot, piece by piece on this thread.

    Raises ExpertDamaged naming file, expert and remedy, or Unavailable; the slot's content is then
    worthless.
    """
    assembly = Assembly(record, slot, PIECE_BYTES)
    for number, piece in enumerate(assembly.pieces):
        read_piece(files, record, piece, slot)
        add_piece(files, record, assembly, number)


@contextmanager
def open_files(manifest: Manifest, root: Path, direct_io: bool) -> Iterator[SourceFiles]:
    """The manifest's files for the block. Raises ManifestInvalid when one cannot be opened."""
    with ExitStack() as stack:
        paths = [resolve_inside(root, file.path) for file in manifest.files]
        try:
            files = SourceFiles(paths, direct_io, stack)
        except OSError as error:
            raise errors.ManifestInvalid(
                f"cannot open {error.filename}: {error.strerror}"
            ) from error
        yield files
