"""A main node whose store has only a share of the experts: what it lacks other boxes compute, and
the bits are those of a whole store.

Written against: the own store asked for what it lacks, a batch's rows sent as one
sequence's, an answer that never came taken for one, experts waited for past the deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.link import Answer
from compute_node.boxes.owners import Shares
from compute_node.engine.engine import Engine
from compute_node.moe.local import LocalBackend
from compute_node.moe.owned import OwnedBackend
from compute_node.moe.step import Batch, Part, Phase, Step
from expert_store.manifest.share import Share
from expert_store.offline.index import index
from expert_store.offline.shard import shard
from proto import errors
from proto.held_experts import HeldExperts
from tests.checkpoints import make
from tests.contract import test_batch
from tests.contract.test_boxes import BoxInProcess
from tests.contract.test_conversations import SECOND, alone, answered, equal
from tests.contract.test_exactness import engine


class Box(BoxInProcess):
    """num_lost: answers that do not come, the next ones"""

    num_lost = 0

    def __init__(self, worker: Engine, held: HeldExperts) -> None:
        super().__init__(worker)
        self.held, self.is_joined = held, True

    def wait(self, answer: Answer, check: Callable[[], None]) -> Tensor | None:
        self.num_lost -= 1
        return None if self.num_lost >= 0 else super().wait(answer, check)


@dataclass
class Halves:
    """node: has one half, held; box: computes the other; whole: has all"""

    node: Engine
    held: HeldExperts
    box: Box
    whole: Engine

    def join(self, deadline_s: float) -> None:
        node, spec, loaded = self.node, self.node.loaded.spec, self.node.loaded
        boxes = Boxes(
            lambda slots, held: Shares(spec.num_experts, slots, held),
            node.cache.capacity.slots,
            self.held,
        )
        boxes.links = [self.box]  # type: ignore[list-item]
        node.cache.elsewhere = boxes
        for layer, module in loaded.experts_modules.items():
            local = LocalBackend(
                layer, node.cache, loaded.prefetcher, loaded.timer, spec.small_variant
            )
            module.flashmoe._backend = OwnedBackend(layer, local, boxes, deadline_s)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halves]:
    folder = tmp_path_factory.mktemp("halves")
    root = make("qwen3_moe", folder / "checkpoint", torch.bfloat16, **test_batch.WIDE)
    index(root, folder / "whole")
    other = shard(folder / "whole", Share(2, 2), folder / "2")
    one = shard(folder / "whole", Share(1, 2), folder / "1")
    names = ("whole", "1", "2")
    runs = [folder / f"run{name}" for name in names]
    for run in runs:
        run.mkdir()
    with (
        engine(folder / "whole", runs[0]) as whole,
        engine(folder / "1", runs[1]) as node,
        engine(folder / "2", runs[2]) as there,
    ):
        yield Halves(node, one.held, Box(there, other.held), whole)


@pytest.fixture(autouse=True)
def _joined(halves: Halves) -> None:
    halves.join(10.0)
    halves.box.num_lost = 0
    halves.box.is_up = halves.box.is_joined = True


def test_two_halves_give_the_bits_of_the_whole(halves: Halves) -> None:
    expected, before = alone(halves.whole, SECOND), halves.box.num_answered
    assert equal(answered(halves.node, SECOND)[0], expected)
    assert halves.box.num_answered > before


def test_so_does_a_batch_of_several_sequences(halves: Halves) -> None:
    parts = Part("a", Phase.DECODE, 1, 9), Part("b", Phase.PREFILL, 3, 3)
    given = test_batch.rows(halves.whole, [5, 2, 9, 11], [5, 5, 7, 0], [3, 9, 1, 0], [15, 2, 5, 4])
    batch = Batch(*parts)
    expected = test_batch.run(halves.whole, Step(batch, lambda: None), given)
    assert torch.equal(test_batch.run(halves.node, Step(batch, lambda: None), given), expected)


def test_what_comes_late_is_asked_for_again(halves: Halves) -> None:
    expected = alone(halves.whole, SECOND)
    halves.box.num_lost = 3
    assert equal(answered(halves.node, SECOND)[0], expected)


def test_a_box_that_rests_is_asked_for_what_only_it_has(halves: Halves) -> None:
    expected = alone(halves.whole, SECOND)
    halves.box.is_up = False
    before = halves.box.num_answered
    assert equal(answered(halves.node, SECOND)[0], expected)
    assert halves.box.num_answered > before


def test_what_nobody_has_is_named_after_the_deadline(halves: Halves) -> None:
    halves.join(0.2)
    halves.box.is_up = halves.box.is_joined = False
    with pytest.raises(errors.Unavailable, match=r"expert L0\dE0\d\d is neither .* start a worker"):
        answered(halves.node, SECOND)
    assert errors.Unavailable.retryable
    halves.box.is_up = halves.box.is_joined = True
    assert equal(answered(halves.node, SECOND)[0], alone(halves.whole, SECOND))


def test_who_waits_may_leave(halves: Halves) -> None:
    halves.box.is_up = halves.box.is_joined = False
    given = test_batch.rows(halves.node, [5, 2, 9, 11])

    def leave() -> None:
        raise errors.Cancelled("the caller went away")

    step = Step(Batch(Part("a", Phase.DECODE, 1, 9)), leave)
    with pytest.raises(errors.Cancelled):
        test_batch.run(halves.node, step, given)
