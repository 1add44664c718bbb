"""Records are read into memory piece by piece, and verified. Damage names file, expert, remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from expert_store.io.device import Request
from expert_store.io.files import PIECE_BYTES, SourceFiles
from expert_store.manifest.extents import ExpertRecord
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sources import resolve_inside
from expert_store.store.assembly import Assembly, ChecksumDiffers
from proto import errors

# What a disk says of bytes that it has lost; anything else may pass.
_LOST = {errno.EIO, errno.EILSEQ, errno.ENODATA, errno.EBADMSG}


def read_piece(
    files: SourceFiles, record: ExpertRecord, request: Request, done_bytes: int = 0
) -> None:
    """Read what is missing of one piece of a record, of which `done_bytes` are there. Raises
    ExpertDamaged, and Unavailable for what may pass, such as a lack of memory.
    """
    path = files.paths[request.file]
    try:
        files.read(request, done_bytes)
    except EOFError as error:
        raise _damaged(record, path, str(error)) from error
    except OSError as error:
        if error.errno in _LOST:
            raise _damaged(record, path, str(error)) from error
        raise errors.Unavailable(
            f"expert {record.key} in {path} cannot be read now ({error.strerror}): retry"
        ) from error


def add_piece(files: SourceFiles, record: ExpertRecord, assembly: Assembly, number: int) -> bool:
    """A piece that was read goes into its record. Returns whether that made it whole. Raises
    ExpertDamaged.
    """
    try:
        return assembly.arrive(number)
    except ChecksumDiffers:
        path = files.paths[record.extents[0].file]
        raise _damaged(record, path, "its checksum differs") from None


def read_record(files: SourceFiles, record: ExpertRecord, slot: memoryview) -> None:
    """Read a record into a slot, piece by piece on this thread.

    Raises ExpertDamaged or Unavailable; the slot's content is then worthless.
    """
    assembly = Assembly(record, slot, PIECE_BYTES)
    for number, piece in enumerate(assembly.pieces):
        read_piece(files, record, piece.request(slot))
        add_piece(files, record, assembly, number)


def _damaged(record: ExpertRecord, path: Path, problem: str) -> errors.ExpertDamaged:
    return errors.ExpertDamaged(
        f"expert {record.key} in {path} is damaged ({problem}): "
        "run `flashmoe verify` on the store, restore the file, restart expert_store"
    )


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
