"""The workers of a main node: those that it is started with, and those of a file that changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.workers_file import WorkerEntry, read_workers
from proto import errors

logger = logging.getLogger(__name__)

NewLink = Callable[[WorkerEntry], WorkerLink]

JOIN_S = 10.0  # a worker may take to compute the first experts
_LOOK_S = 0.5


@contextmanager
def joined(addresses: Sequence[str], new_link: NewLink) -> Iterator[list[WorkerLink]]:
    """Links to them, for the block. One that is away now joins when it comes.

    Raises VersionMismatch and OtherBits for one that cannot be used.
    """
    with ExitStack() as stack:
        links = [
            stack.enter_context(new_link(WorkerEntry(address=address))) for address in addresses
        ]
        for link in links:
            if not link.wait_up(JOIN_S):
                logger.warning("worker is away", extra={"box": link.address})
        yield links


class Follower:
    """Keeps the links of `boxes` as the file says, beside those that it has, for the block. A
    worker that cannot be used is logged and given nothing; a file that cannot be read changes
    nothing.

    Raises ConfigInvalid when the file cannot be read at the start.
    """

    def __init__(self, path: Path, boxes: Boxes, new_link: NewLink) -> None:
        self._path, self._boxes, self._new_link = path, boxes, new_link
        self._fixed = tuple(boxes.links)
        self._links: dict[WorkerEntry, WorkerLink] = {}
        self._seen: tuple[int, int] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="workers file", daemon=True)

    def __enter__(self) -> Follower:
        self._seen = self._mark()
        self._take(read_workers(self._path))
        for link in self._links.values():
            try:
                link.wait_up(JOIN_S)
            except (errors.VersionMismatch, errors.OtherBits) as error:
                logger.error("worker refused", extra={"box": link.address, "reason": str(error)})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._take(())

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_S):
            if (mark := self._mark()) == self._seen:
                continue
            self._seen = mark
            try:
                self._take(read_workers(self._path))
            except errors.ConfigInvalid as error:
                logger.warning("workers file unread", extra={"reason": str(error)})

    def _take(self, entries: Sequence[WorkerEntry]) -> None:
        """Open what is new before what is gone is closed: its work is computed elsewhere then."""
        gone = [link for entry, link in self._links.items() if entry not in entries]
        self._links = {
            entry: self._links.get(entry) or self._new_link(entry).__enter__() for entry in entries
        }
        self._boxes.links = (*self._fixed, *self._links.values())
        for link in gone:
            link.__exit__()

    def _mark(self) -> tuple[int, int] | None:
        """What differs once the file was written again."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns
