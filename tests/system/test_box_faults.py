"""Boxes in network namespaces, with links and disks of their own: whatever becomes of a worker in
the middle of a token, the text is that of one box and goes on soon.

Each test records the longest time between two tokens, `gap_s`. Bounds are wide, for slow machines:
they are below what gRPC takes to notice.
Planted fault seen red: a late answer that is awaited.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.report.status import check_health
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from proto import errors
from tests.boxlab.box import Box
from tests.boxlab.disk import make_image
from tests.boxlab.group import Throttle
from tests.boxlab.laboratory import laboratory, why_not
from tests.boxlab.switch import Link
from tests.expert_store.stores import flip
from tests.stack import MODEL, ServedStack, wait_for

pytestmark = [pytest.mark.system, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
PROMPT, TOKENS = "In the beginning God created", 40
FAULT_AT = 8  # tokens
MOST_GAP_S = 8.0
FEW = ("--experts-memory", "12.5%")  # so that workers read
Record = Callable[[str, object], None]


@dataclass
class Boxes:
    """A main node and its workers: the boxes, and what runs on them."""

    main: Box
    workers: list[Box]
    main_stack: ServedStack
    worker_stacks: list[ServedStack]

    def generate(self, fault: Callable[[], None] = lambda: None) -> tuple[list[int], float]:
        """Tokens, and the longest time between two of them. fault: happens in the middle"""
        tokens, came_s = [], []
        with self.main.client() as client:
            for piece in client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, timeout_s=100):
                tokens.append(piece.token_id)
                came_s.append(time.monotonic())
                if len(tokens) == FAULT_AT:
                    fault()
        return tokens, max(b - a for a, b in pairwise(came_s))

    def figure(self, number: int, name: str) -> float:
        """Of a worker, as the main node counts it."""
        with self.main.client() as client:
            return float(getattr(client.stats().of(box=self.workers[number].address), name))

    def is_serving(self) -> bool:
        return check_health(self.main.run.address("compute_node")) == "SERVING"

    def are_let_go(self) -> bool:
        """No main node has a connection to a worker."""
        return not any(box.num_connections for box in self.workers)

    def heal(self) -> None:
        """As at first, and every worker up."""
        for box in (self.main, *self.workers):
            box.heal()
        for number in range(len(self.workers)):
            wait_for(partial(self.is_up, number), 60, "a worker to be up")

    def is_up(self, number: int) -> bool:
        return self.figure(number, "up") == 1


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shipped model and a store over it, on three disks."""
    folder = tmp_path_factory.mktemp("images")
    for file in shutil.copytree(MODEL, folder / "content/model").iterdir():
        os.utime(file, (0, 0))  # images keep whole seconds
    index(folder / "content/model", folder / "content/store")
    first, *others = [folder / f"{n}.image" for n in range(3)]
    make_image(folder / "content", first)
    for other in others:
        shutil.copy(first, other)
    return [first, *others]


@pytest.fixture(scope="module")
def started(images: list[Path]) -> Iterator[Boxes]:
    with laboratory(images) as (main, *workers), ExitStack() as stack:
        stacks = together(stack, [box.worker(*FEW) for box in workers])
        yield Boxes(main, workers, stack.enter_context(main.main(workers, *FEW)), stacks)


@pytest.fixture(scope="module")
def expected(started: Boxes) -> list[int]:
    """The text of the main node alone: nothing of the workers reaches it."""
    for box in started.workers:
        box.cut_off()
    tokens, _ = started.generate()
    return tokens


@pytest.fixture
def boxes(started: Boxes, expected: list[int]) -> Boxes:
    started.heal()
    return started


@contextmanager
def damaged(box: Box, stack: ServedStack) -> Iterator[None]:
    """Experts that its store reads in the block are damaged; after it the store starts anew."""
    flip_all(box.store_dir)
    try:
        yield
    finally:
        flip_all(box.store_dir)
        stack.kill("expert_store")


def flip_all(store_dir: Path) -> None:
    """Change a byte of every expert, or change it back."""
    manifest = Manifest.load(store_dir)
    for record in manifest.records.values():
        extent = record.extents[0]
        path = manifest.root(store_dir) / manifest.files[extent.file].path
        flip(path, extent.offset_bytes + 100)


def together(
    stack: ExitStack, starting: Sequence[AbstractContextManager[ServedStack]]
) -> list[ServedStack]:
    """Started at once."""
    with ThreadPoolExecutor(len(starting)) as threads:
        return list(threads.map(stack.enter_context, starting))


def test_tokens_are_those_of_one_box(
    boxes: Boxes, expected: list[int], record_testsuite_property: Record
) -> None:
    before = [boxes.figure(number, "answered") for number in (0, 1)]
    tokens, gap_s = boxes.generate()
    record_testsuite_property("gap_s, tokens are those of one box", gap_s)
    assert tokens == expected
    assert all(boxes.figure(n, "answered") > before[n] + TOKENS for n in (0, 1))


def test_a_worker_that_is_killed(
    boxes: Boxes, expected: list[int], record_testsuite_property: Record
) -> None:
    tokens, gap_s = boxes.generate(lambda: boxes.worker_stacks[0].kill("compute_node.worker"))
    record_testsuite_property("gap_s, killed", gap_s)
    assert tokens == expected and gap_s < MOST_GAP_S
    wait_for(partial(boxes.is_up, 0), 60, "the worker to join again")


def test_a_worker_that_is_cut_off(
    boxes: Boxes, expected: list[int], record_testsuite_property: Record
) -> None:
    late = boxes.figure(0, "late")
    tokens, gap_s = boxes.generate(boxes.workers[0].cut_off)
    record_testsuite_property("gap_s, cut off", gap_s)
    assert tokens == expected and gap_s < MOST_GAP_S
    assert boxes.figure(0, "late") > late or boxes.figure(0, "up") == 0


@pytest.mark.parametrize("how", ["link", "disk"])
def test_a_worker_that_is_slow(
    how: str, boxes: Boxes, expected: list[int], record_testsuite_property: Record
) -> None:
    box = boxes.workers[0]
    faults: dict[str, Callable[[], None]] = {
        "link": lambda: box.switch.set(box.name, Link(0.15, 100_000_000)),
        "disk": lambda: box.group.throttle(Throttle(100_000, 10)),
    }
    tokens, gap_s = boxes.generate(faults[how])
    record_testsuite_property(f"gap_s, slow: {how}", gap_s)
    assert tokens == expected and gap_s < MOST_GAP_S


def test_a_worker_whose_disk_is_damaged(
    boxes: Boxes, expected: list[int], record_testsuite_property: Record
) -> None:
    box, failed = boxes.workers[1], boxes.figure(1, "failed")
    with damaged(box, boxes.worker_stacks[1]):
        tokens, gap_s = boxes.generate()
    record_testsuite_property("gap_s, whose disk is damaged", gap_s)
    assert tokens == expected and gap_s < MOST_GAP_S
    assert boxes.figure(1, "failed") > failed


def test_a_main_node_that_is_killed_lets_its_workers_go(boxes: Boxes, expected: list[int]) -> None:
    launcher = boxes.main_stack.process
    wait_for(lambda: [box.num_connections for box in boxes.workers] == [1, 1], 10, "connections")

    def kill() -> None:
        launcher.send_signal(signal.SIGSTOP)  # does not start another meanwhile
        boxes.main_stack.kill("compute_node")

    try:
        with pytest.raises(errors.Unavailable):
            boxes.generate(kill)
        wait_for(boxes.are_let_go, 10, "workers to be let go")
    finally:
        launcher.send_signal(signal.SIGCONT)
    wait_for(boxes.is_serving, 60, "the main node to be back")
    boxes.heal()
    assert boxes.generate()[0] == expected
