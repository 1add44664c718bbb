"""The workers that a main node is started with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from compute_node.boxes.link import WorkerLink
from compute_node.boxes.probe import Probe
from proto.rpc import TlsFiles

logger = logging.getLogger(__name__)

_JOIN_S = 10.0  # a worker may take to compute the first experts


@contextmanager
def joined(
    addresses: Sequence[str], fingerprint: str, probe: Probe, tls: TlsFiles | None
) -> Iterator[list[WorkerLink]]:
    """Links to them, for the block. One that is away now joins when it comes.

    Raises VersionMismatch and OtherBits for one that cannot be used.
    """
    with ExitStack() as stack:
        links = [
            stack.enter_context(WorkerLink(address, fingerprint, probe, tls))
            for address in addresses
        ]
        for link in links:
            if not link.wait_up(_JOIN_S):
                logger.warning("worker is away", extra={"box": link.address})
        yield links
