"""A batch of sequences gives every row the bits that its sequence gets alone, on one box and with
another that computes its share.

Planted faults seen red: all rows added up as one prompt, a row given the experts of the other, hits
of all sequences counted as everybody's, a batch that another box takes for one sequence's, rows of
a box given to the wrong sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from compute_node.cache.asked import Nowhere
from compute_node.engine.engine import Engine
from compute_node.moe.step import Batch, NotInStep, Part, Phase, Step
from expert_store.offline.pack import pack
from tests.checkpoints import make
from tests.contract.test_boxes import BoxInProcess, joined
from tests.contract.test_exactness import engine

LAYER, TOP_K, NUM_EXPERTS, HIDDEN = 1, 4, 16, 256
WIDE = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": 96,
    "head_dim": 64,
}  # native kernels take these
DECODE, PREFILL = Phase.DECODE, Phase.PREFILL
Rows = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("batch")
    root = make("qwen3_moe", folder / "checkpoint", request.param, **WIDE)
    pack(root, folder / "store")
    with engine(folder / "store", folder, spare=8) as started:
        yield started


@pytest.fixture(scope="module")
def there(node: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Another box with the same store."""
    folder = tmp_path_factory.mktemp("there")
    with engine(node.model_dir, folder) as started:
        yield started


@contextmanager
def sharing(node: Engine, box: BoxInProcess) -> Iterator[None]:
    """The box computes its share, for the block."""
    layers = [module.flashmoe for module in node.loaded.experts_modules.values()]
    former = [layer._backend for layer in layers]
    joined(node, box)
    try:
        yield
    finally:
        node.cache.elsewhere = Nowhere()
        for layer, backend in zip(layers, former, strict=True):
            layer._backend = backend


def rows(node: Engine, *ids: list[int]) -> Rows:
    """hidden [T, D], topk_ids [T, K], topk_weights [T, K]"""
    generator = torch.Generator().manual_seed(len(ids))
    hidden = torch.randn(len(ids), HIDDEN, generator=generator).to(node.loaded.dtype)
    return hidden, torch.tensor(ids), torch.rand(len(ids), TOP_K, generator=generator)


@torch.inference_mode()
def run(node: Engine, step: Step, given: Rows) -> Tensor:
    with step.running():
        output: Tensor = node.loaded.experts_modules[LAYER](*given)
    return output


def alone(node: Engine, part: Part, given: Rows) -> Tensor:
    return run(node, Step(Batch(part), lambda: None), given)


def only(given: Rows, chosen: slice) -> Rows:
    hidden, ids, weights = given
    return hidden[chosen].clone(), ids[chosen], weights[chosen]


PARTS = [
    (Part("a", DECODE, 1, 9), Part("b", DECODE, 1, 4)),
    (Part("a", DECODE, 1, 9), Part("b", PREFILL, 3, 3)),
    (Part("a", PREFILL, 2, 2), Part("b", DECODE, 1, 8), Part("c", DECODE, 1, 7)),
]
NAMES = ["two decode", "decode and prompt", "prompt and two decode"]


def batch_of(node: Engine, parts: tuple[Part, ...]) -> tuple[Batch, Rows, Tensor]:
    """One expert is chosen by several; the second row names one twice. Returns what each sequence
    gets alone, too.
    """
    given = rows(node, [5, 2, 9, 11], [5, 5, 7, 0], [3, 9, 1, 0], [15, 2, 5, 4])
    batch = Batch(*parts)
    given = only(given, slice(0, batch.rows[-1].stop))
    expected = [
        alone(node, part, only(given, chosen))
        for part, chosen in zip(parts, batch.rows, strict=True)
    ]
    return batch, given, torch.cat(expected)


@pytest.mark.parametrize("parts", PARTS, ids=NAMES)
def test_each_row_has_the_bits_of_its_sequence_alone(parts: tuple[Part, ...], node: Engine) -> None:
    batch, given, expected = batch_of(node, parts)
    assert torch.equal(run(node, Step(batch, lambda: None), given), expected)


@pytest.mark.parametrize("loses", [False, True], ids=["answers", "loses"])
@pytest.mark.parametrize("parts", PARTS, ids=NAMES)
def test_another_box_computes_its_share_of_a_batch_in_one_message(
    parts: tuple[Part, ...], loses: bool, node: Engine, there: Engine
) -> None:
    batch, given, expected = batch_of(node, parts)
    box = BoxInProcess(there, loses)
    with sharing(node, box):
        assert torch.equal(run(node, Step(batch, lambda: None), given), expected)
    assert box.num_asked == 1 and box.num_answered == (not loses)


def test_a_layer_asked_for_rows_of_decode_computes_each_alone(node: Engine) -> None:
    """Red where the rows are taken for one sequence's."""
    given = rows(node, [5, 2, 9, 11], [5, 5, 7, 0], [3, 9, 1, 0], [15, 2, 5, 4])
    expected = [
        alone(node, Part("a", DECODE, 1, 1), only(given, slice(row, row + 1))) for row in range(4)
    ]
    assert torch.equal(node.forward_layer(LAYER, *given, DECODE), torch.cat(expected))


def test_accesses_are_split_by_sequence(node: Engine) -> None:
    alone(node, Part("a", DECODE, 1, 1), rows(node, [1, 2, 3, 4]))
    step = Step(Batch(Part("a", DECODE, 1, 9), Part("b", DECODE, 1, 4)), lambda: None)
    given = rows(node, [1, 2, 12, 13], [3, 2, 14, 15])
    run(node, step, given)
    first, second = (one.accesses[LAYER] for one in step.alone())
    assert (first.ids.tolist(), second.ids.tolist()) == ([[1, 2, 12, 13]], [[3, 2, 14, 15]])
    assert torch.equal(second.weights, given[2][1:])
    assert first.hits >= {1, 2} and not first.hits & {3, 14, 15}
    assert second.hits >= {2, 3} and not second.hits & {1, 12, 13}


def test_a_check_ends_a_batch(node: Engine) -> None:
    def check() -> None:
        raise TimeoutError

    parts = Part("a", DECODE, 1, 9), Part("b", DECODE, 1, 4)
    with pytest.raises(TimeoutError):
        run(node, Step(Batch(*parts), check), rows(node, [1, 2, 3, 4], [5, 6, 7, 8]))


def test_outside_of_a_step_the_model_refuses(node: Engine) -> None:
    """Also after a step ended, however that was. Red when the latest step is remembered."""
    part = Part("a", DECODE, 1, 9)
    alone(node, part, rows(node, [1, 2, 3, 4]))
    with pytest.raises(ZeroDivisionError), Step(Batch(part), lambda: None).running():
        raise ZeroDivisionError
    with pytest.raises(NotInStep, match="outside of a step"):
        node.loaded.experts_modules[LAYER](*rows(node, [1, 2, 3, 4]))
