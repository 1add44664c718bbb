"""Engines that answer several clients at once, each inside a memory cgroup of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers.cgroup import memory_group
from tests.bench.peers.disk import own_read_ahead_bytes
from tests.bench.peers.engine import Engine, Setup, Start
from tests.bench.peers.flashmoe import flashmoe, flashmoe_lossless
from tests.bench.peers.laboratory import FOLDER, Laboratory, present_commit
from tests.bench.peers.llama_cpp import llama_cpp_slots
from tests.bench.peers.models import GGUF, LOSSLESS, STORE, PeerModel
from tests.bench.peers.run import Counters, DiskAndGroup
from tests.bench.widen import MIB

RECORD_BYTES = 24 * MIB
MODEL = PeerModel(RECORD_BYTES, formats=(GGUF, STORE, LOSSLESS))

ENGINES: dict[str, Callable[[int], Start]] = {
    "FlashMoE": lambda _: flashmoe,
    "FlashMoE lossless": lambda _: flashmoe_lossless,
    "llama.cpp": lambda slots: llama_cpp_slots(slots),
}


@dataclass(frozen=True)
class Running:
    """An engine that answers, and what is counted beside it."""

    engine: Engine
    counters: Counters


@contextmanager
def running(python: Path, name: str, share: float | None, num_clients: int) -> Iterator[Running]:
    """The widened model in one engine, cold. share: percent of the model's file that all of its
    processes may hold; None: no limit
    """
    laboratory = Laboratory("clients", MODEL, python, present_commit())
    size = laboratory.prepare()
    limit = None if share is None else int(size * share / 100) // MIB * MIB
    disk = laboratory.disk
    with ExitStack() as stack:
        folder = stack.enter_context(disk.mounted(own_read_ahead_bytes(FOLDER)))
        group = stack.enter_context(memory_group(limit))
        setup = Setup(python, folder, group, limit, laboratory.log(name))
        engine = stack.enter_context(ENGINES[name](num_clients)(setup))
        yield Running(engine, DiskAndGroup(disk, group))


def at_once(works: list[Callable[[], None]]) -> None:
    """Each in a thread of its own. Raises what the first that failed raises."""
    failures = list[BaseException]()

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
