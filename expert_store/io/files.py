"""Files open for aligned reads into memory: direct, or buffered without leaving a page cache."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path

from expert_store.io.device import Request
from proto.shm import PAGE_BYTES, align_up

logger = logging.getLogger(__name__)

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

    def read(self, request: Request, done_bytes: int = 0) -> None:
        """Read what is missing of `request`, of which `done_bytes` are there. Raises OSError, and
        EOFError when the file ends before the needed bytes do.
        """
        descriptor = self.descriptor(request.file)
        done = done_bytes - done_bytes % PAGE_BYTES
        start, end = request.start_bytes, request.start_bytes + request.length_bytes
        while done < request.needed_bytes:
            # Given back at once: a view kept by an error's traceback keeps the segment mapped.
            with request.memory[start + done : end] as rest:
                got = os.preadv(descriptor, [rest], request.offset_bytes + done)
            if got == 0 or (got % 512 and done + got < request.needed_bytes):
                raise EOFError(f"the file ends {request.needed_bytes - done - got} bytes early")
            done += got
        if not self.direct:
            offset, length = request.offset_bytes, align_up(done)
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

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
