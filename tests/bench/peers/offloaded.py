"""transformers with experts on disk, two ways: mapped in place, and accelerate's disk_offload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.peers.engine import THREADS, Setup
from tests.bench.peers.models import FUSED, OFFLOADED
from tests.bench.peers.worker import Worker, working
from tests.bench.widen import MIB

_ROOM_BYTES = 1024 * MIB  # Python, torch, and what of a layer is in use


@contextmanager
def transformers(setup: Setup) -> Iterator[Worker]:
    """device_map="auto": layers that fit beside the process stay in memory, the others' files are
    mapped. Without a limit, plain transformers.
    """
    where = "memory"
    if setup.limit_bytes is not None:
        where = str(max(0, setup.limit_bytes - _ROOM_BYTES) // MIB)
    with working(setup, _command(setup, where)) as worker:
        yield worker


@contextmanager
def accelerate(setup: Setup) -> Iterator[Worker]:
    """disk_offload: a layer's weights are copied from disk each time that it is computed."""
    with working(setup, _command(setup, str(setup.folder / OFFLOADED))) as worker:
        yield worker


def _command(setup: Setup, where: str) -> list[str]:
    module = [str(setup.python), "-m", "tests.bench.peers.offload_worker"]
    return [*module, str(setup.folder / FUSED), where, str(THREADS)]
