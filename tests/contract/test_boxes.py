"""Experts computed on another box, through the messages of the wire: on every architecture the
bits of one box.

Planted fault seen red: a token's experts added in the order in which they came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compute_node.boxes.answer import Answer
from compute_node.boxes.box_residents import BoxResidents, to_bytes
from compute_node.boxes.boxes import Boxes
from compute_node.boxes.owners import Shares
from compute_node.boxes.times import Times
from compute_node.boxes.work import Work, bytes_of, tensor_of
from compute_node.engine.engine import Engine
from compute_node.moe.local import LocalBackend
from compute_node.moe.owned import OwnedBackend
from compute_node.worker.lent_experts import LentExperts
from expert_store.offline.index import index
from proto import worker_pb2 as pb
from proto.held_experts import ALL_EXPERTS
from tests.architectures import causal_types, tiny_config
from tests.checkpoints import ARCHITECTURES, make, save
from tests.contract.test_conversations import SECOND, alone, answered, equal
from tests.contract.test_every_architecture import REFUSED
from tests.contract.test_exactness import engine


class BoxInProcess:
    """A worker without a stream. num_asked, num_answered: requests; loses: it answers none; looks:
    how often it is looked for an answer before it has come
    """

    def __init__(self, worker: Engine, loses: bool = False, looks: int = 0) -> None:
        loaded = worker.loaded
        self.address, self.is_up, self.slots = "box", True, worker.cache.capacity.slots
        self.num_asked = self.num_answered = 0
        self._loses, self.cost = loses, 1.0
        self._looks = self._looks_left = looks
        self.held, self.residents = ALL_EXPERTS, BoxResidents()
        self.times, self.expert_s, self.read_s = Times(), 0.001, 0.01
        self.times.way(0.001)
        self._shape = loaded.hidden_size, loaded.dtype
        self._lent = LentExperts(loaded.kernels, loaded.spec.num_experts, worker.cache)

    def ask(self, work: Work, own_s: float = 0.0) -> Answer:
        self.num_asked += 1
        self._looks_left = self._looks
        return Answer(1, work, 0.0, 0.0, own_s)

    def comes_soon(self, answer: Answer) -> bool:
        return not self._looks

    def need_not_wait(self, answer: Answer) -> bool:
        self._looks_left -= 1
        return self._looks_left < 0

    def wait(self, answer: Answer, check: Callable[[], None]) -> Tensor | None:
        work = answer.work
        if self._loses:
            return None
        sent = pb.WorkRequest.FromString(work.to_pb(1).SerializeToString())
        made = self._lent.compute(Work.from_pb(sent, *self._shape), check)
        self.num_answered += 1
        self.residents.heard(work.layer, to_bytes(self._lent.held_of(work.layer)))
        return tensor_of(bytes_of(made), work.hidden.dtype, len(made))

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        self._lent.prepare(layer, experts)

    def move_in(self, layer: int, experts: Sequence[int]) -> None:
        self._lent.move_in(layer, experts)


def joined(node: Engine, box: BoxInProcess, chooses: bool = False) -> None:
    """The node gives work to the box; chooses: where it costs least."""
    spec, loaded = node.loaded.spec, node.loaded
    boxes = Boxes(
        lambda slots, held: Shares(spec.num_experts, slots, held),
        node.cache.capacity.slots,
        here=node.cache if chooses else None,
    )
    boxes.links = [box]  # type: ignore[list-item]
    node.cache.elsewhere = boxes
    for layer, module in loaded.experts_modules.items():
        local = LocalBackend(layer, node.cache, loaded.prefetcher, loaded.timer, spec.small_variant)
        module.flashmoe._backend = OwnedBackend(layer, local, boxes)


@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, *(one for one in causal_types() if one not in REFUSED)]
)
def test_another_box_gives_the_bits_of_one(name: str, tmp_path: Path) -> None:
    if name in ARCHITECTURES:
        root = make(name, tmp_path / "checkpoint", torch.bfloat16, seed=3)
    else:
        root = save(tiny_config(name), tmp_path / "checkpoint", torch.float32)
    index(root, tmp_path / "store")
    (tmp_path / "there").mkdir()
    with (
        engine(tmp_path / "store", tmp_path) as node,
        engine(tmp_path / "store", tmp_path / "there") as there,
    ):
        expected = alone(node, SECOND)
        box = BoxInProcess(there)
        joined(node, box)
        assert equal(answered(node, SECOND)[0], expected)
        assert box.num_answered > len(node.loaded.experts_modules), "it had work"
        joined(node, BoxInProcess(there, loses=True))
        assert equal(answered(node, SECOND)[0], expected), "what never comes is computed here"


def test_where_it_costs_least_has_the_bits_of_one(tmp_path: Path) -> None:
    """Experts move to where they were read. Planted fault seen red: what another computes, computed
    here once more.
    """
    index(make("qwen3_moe", tmp_path / "checkpoint", torch.bfloat16, seed=3), tmp_path / "store")
    (tmp_path / "there").mkdir()
    with (
        engine(tmp_path / "store", tmp_path) as node,
        engine(tmp_path / "store", tmp_path / "there") as there,
    ):
        expected = alone(node, SECOND)
        box = BoxInProcess(there)
        joined(node, box, chooses=True)
        for _ in range(3):
            assert equal(answered(node, SECOND)[0], expected)
        assert box.num_answered > len(node.loaded.experts_modules) and len(box.residents)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_the_wait_for_a_box_is_used_to_run_ahead(name: str, tmp_path: Path) -> None:
    """Planted fault seen red: the wait slept over."""
    index(make(name, tmp_path / "checkpoint", torch.bfloat16, seed=3), tmp_path / "store")
    (tmp_path / "there").mkdir()
    with (
        engine(tmp_path / "store", tmp_path, run_ahead="auto") as node,
        engine(tmp_path / "store", tmp_path / "there") as there,
    ):
        expected, run_ahead = alone(node, SECOND), node.run_ahead
        assert run_ahead is not None and run_ahead.status == "on"
        run_ahead._worth._wait_s = 1.0  # there were waits until now
        before = run_ahead.num_layers
        box = BoxInProcess(there, looks=100)
        joined(node, box)
        assert equal(answered(node, SECOND)[0], expected)
        assert run_ahead.num_layers > before and node.cache.waits.away_s > 0


def test_an_answer_that_comes_soon_is_waited_for(tmp_path: Path) -> None:
    """Planted fault seen red: a second pass in every wait."""
    index(make("mixtral", tmp_path / "checkpoint", torch.bfloat16, seed=3), tmp_path / "store")
    (tmp_path / "there").mkdir()
    with (
        engine(tmp_path / "store", tmp_path, run_ahead="auto") as node,
        engine(tmp_path / "store", tmp_path / "there") as there,
    ):
        box = BoxInProcess(there)
        joined(node, box)
        alone(node, SECOND)
        assert box.num_answered > 0 and node.cache.waits.away_s == 0


def test_a_long_wait_counts_also_where_nothing_runs_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what was waited it is decided whether to run ahead. Planted fault seen red: only the time
    of the second pass counted.
    """
    index(make("mixtral", tmp_path / "checkpoint", torch.bfloat16, seed=3), tmp_path / "store")
    (tmp_path / "there").mkdir()
    with (
        engine(tmp_path / "store", tmp_path, run_ahead="off") as node,
        engine(tmp_path / "store", tmp_path / "there") as there,
    ):
        box = BoxInProcess(there, looks=1)
        wait = box.wait

        def slow(answer: Answer, check: Callable[[], None]) -> Tensor | None:
            time.sleep(0.002)
            return wait(answer, check)

        monkeypatch.setattr(box, "wait", slow)
        joined(node, box)
        alone(node, SECOND)
        assert node.cache.waits.away_s >= 0.002 * box.num_answered > 0
