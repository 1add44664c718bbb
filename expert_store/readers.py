"""The threads that read: each asks the store what is next, reads that piece, hashes what it can."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from expert_store.fills import Fill
from expert_store.reader import SourceFiles, add_piece, read_piece
from expert_store.sessions import Session
from expert_store.store import ExpertStore
from proto import errors

logger = logging.getLogger(__name__)

_SHORT_BYTES = 256 * 1024 + 4096


class Readers:
    """As many as the read depth, and one more: while it hashes, the device keeps its depth.

    Use as a context manager; leaving it lets reads under way end.
    """

    def __init__(self, store: ExpertStore, files: SourceFiles) -> None:
        self._store = store
        self._files = files
        self._threads = [
            threading.Thread(target=self._run, name=f"read-{number}")
            for number in range(store.read_depth + 1)
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
        for thread in self._threads:
            thread.join()
        self._store.give_up()

    def _run(self) -> None:
        while (issued := self._store.next_piece()) is not None:
            self._read(*issued)

    def _read(self, fill: Fill[Session], number: int) -> None:
        assert fill.assembly is not None
        is_whole = False
        problem: errors.FlashMoEError | None = None
        # Hashed sooner than another reader wakes up: this one goes on by itself.
        is_short = fill.assembly.pieces[number].length_bytes <= _SHORT_BYTES
        try:
            is_whole = self._read_and_add(fill, number, is_short)
        except errors.ExpertDamaged as error:
            problem = error
        except Exception as error:  # carried to whoever waits: a reader outlives it
            logger.exception("read failed")
            problem = errors.FlashMoEError(f"the store failed: {error!r}")
        self._store.piece_done(fill, is_whole, problem, came_now=is_short)

    def _read_and_add(self, fill: Fill[Session], number: int, is_short: bool) -> bool:
        assert fill.assembly is not None and fill.view is not None
        try:
            read_piece(self._files, fill.record, fill.assembly.pieces[number], fill.view)
        finally:
            if not is_short:
                self._store.piece_came(fill)
        return add_piece(self._files, fill.record, fill.assembly, number)
