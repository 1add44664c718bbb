"""The workers of a main node: those of its settings, which stay, and others that come and go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.workers_file import WorkerEntry
from proto import errors

logger = logging.getLogger(__name__)

NewLink = Callable[[WorkerEntry], WorkerLink]

JOIN_S = 10.0  # a worker may take to compute the first experts


class JoinedWorkers:
    """The links of `boxes`, for the block. One that is away joins when it comes.

    addresses: of the settings

    Raises VersionMismatch and OtherBits for one of the settings that cannot be used.
    """

    def __init__(self, boxes: Boxes, new_link: NewLink, addresses: Sequence[str] = ()) -> None:
        self._boxes, self._new_link, self._addresses = boxes, new_link, addresses
        self._fixed: Sequence[WorkerLink] = ()
        self._open = ExitStack()  # those
        self._links: dict[WorkerEntry, WorkerLink] = {}

    def __enter__(self) -> JoinedWorkers:
        with ExitStack() as stack:
            entries = [WorkerEntry(address=address) for address in self._addresses]
            self._fixed = [stack.enter_context(self._new_link(entry)) for entry in entries]
            for link in self._fixed:
                _wait_up(link)
            self._boxes.links = tuple(self._fixed)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.take(())
        self._boxes.links = ()
        self._open.close()

    def take(self, entries: Sequence[WorkerEntry]) -> None:
        """Have a link to each of these, beside those of the settings, and to no other. One thread.

        What is new is opened before what is gone is closed: its work is computed elsewhere then.
        Raises ConfigInvalid, and changes nothing, when certificates cannot be read.
        """
        with ExitStack() as stack:
            new = {
                entry: stack.enter_context(self._new_link(entry))
                for entry in entries
                if entry not in self._links
            }
            stack.pop_all()
        gone = [link for entry, link in self._links.items() if entry not in entries]
        self._links = {entry: self._links.get(entry) or new[entry] for entry in entries}
        self._boxes.links = (*self._fixed, *self._links.values())
        for link in gone:
            link.__exit__()

    def wait_up(self) -> None:
        """Until those taken take work. One that cannot be used is logged, and given nothing."""
        for link in self._links.values():
            try:
                _wait_up(link)
            except (errors.VersionMismatch, errors.OtherBits) as error:
                logger.error("worker refused", extra={"box": link.address, "reason": str(error)})


def _wait_up(link: WorkerLink) -> None:
    """Raises VersionMismatch, OtherBits."""
    if not link.wait_up(JOIN_S):
        logger.warning("worker is away", extra={"box": link.address})
