"""The threads that take what the device brings: each piece is completed, hashed, and said to be
there.
"""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType

from expert_store.io.files import SourceFiles
from expert_store.store.fill import PieceRead
from expert_store.store.store import ExpertStore
from expert_store.store.verified_read import add_piece, read_piece
from proto import errors

logger = logging.getLogger(__name__)

_SHORT_BYTES = 256 * 1024 + 4096


class Readers:
    """Use as a context manager; leaving it lets reads under way end."""

    def __init__(self, store: ExpertStore, files: SourceFiles) -> None:
        self._store = store
        self._device = store.device
        self._files = files
        self._threads = [
            threading.Thread(target=self._run, name=f"read-{number}")
            for number in range(self._device.num_readers)
        ]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._store.stop()
        self._device.stop()
        for thread in self._threads:
            thread.join()
        self._store.give_up()

    def _run(self) -> None:
        try:
            while (came := self._device.wait()) is not None:
                self._take(*came)
        except BaseException:
            logger.critical("a reader failed, the store ends", exc_info=True)
            _end_process()  # its waiters would wait for ever; another store starts clean

    def _take(self, read: PieceRead, done_bytes: int) -> None:
        is_whole = False
        problem: errors.FlashMoEError | None = None
        # A short piece is hashed sooner than another read could be issued: one call says both.
        is_short = read.length_bytes <= _SHORT_BYTES
        try:
            is_whole = self._read_and_add(read, done_bytes, is_short)
        except errors.FlashMoEError as error:
            problem = error
        except Exception as error:  # carried to the waiters: a reader outlives it
            logger.exception("read failed")
            problem = errors.FlashMoEError(f"the store failed: {error!r}")
        self._store.piece_done(read, is_whole, problem, came_now=is_short)

    def _read_and_add(self, read: PieceRead, done_bytes: int, is_short: bool) -> bool:
        fill = read.fill
        assert fill.assembly is not None
        try:
            if done_bytes < read.needed_bytes:
                read_piece(self._files, fill.record, read, done_bytes)
        finally:
            if not is_short:
                self._store.piece_came(read)
        return add_piece(self._files, fill.record, fill.assembly, read.number)


def _end_process() -> None:
    logging.shutdown()
    os._exit(1)
