"""One token's products by native gemv: torch's bits where it is trusted, and trusted only there.

Planted faults seen red: accumulators of 256 columns, a first accumulator added to zero, the last of
17 rows left out, a bias added after rounding, one input used for all matrices.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compute_node.kernels import gemv
from compute_node.kernels.one_token_linear import OneTokenLinear, adopt
from compute_node.kernels.prober import Prober
from compute_node.native import binding

# With AMX, oneDNN adds in another order, and torch multiplies everything itself.
needs_kernel = pytest.mark.skipif(
    binding.obstacle() != "" or "amx_bf16" in Path("/proc/cpuinfo").read_text(),
    reason=binding.obstacle() or "torch multiplies with AMX here",
)
pytestmark = pytest.mark.usefixtures("threads")
SHAPES = [(192, 256), (256, 96), (17, 1024), (2048, 1536), (300, 5120)]


def is_exact(weight: Tensor, bias: Tensor | None = None) -> bool:
    return gemv.verdict_of(Prober(), weight, bias).way > 0


def matrices(shape: tuple[int, int], count: int = 1) -> list[Tensor]:
    """Of trained weights' size. Every other one's second half undoes its first, so that rounding
    errors are what is left of a sum.
    """
    made = []
    for number in range(count):
        weight = torch.randn(shape) * 0.05
        half = shape[1] // 2
        if number % 2:
            weight[:, half:] = weight[:, :half] * (1 + 1e-2 * torch.randn(shape[0], half))
        made.append(weight.bfloat16())
    return made


def inputs(num_columns: int, count: int = 1) -> Tensor:
    """[count, num_columns]; fits the matrices that undo themselves."""
    half = torch.randn(count, num_columns // 2)
    return torch.cat([half, -half], dim=1).bfloat16()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_compiled_wherever_there_is_a_compiler() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    assert binding.obstacle() != binding.NOT_COMPILED


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_torch(shape: tuple[int, int]) -> None:
    weights, bias = matrices(shape, 2), torch.randn(shape[0]).bfloat16()
    assert is_exact(weights[0])
    for weight in weights:
        for scale in (1.0, 2.0**-118, 2.0**60):
            x = inputs(shape[1]) * scale
            assert same_bits(gemv.multiply([weight], x), functional.linear(x, weight))
    assert is_exact(weights[0], bias)
    x = inputs(shape[1])
    assert same_bits(gemv.multiply([weights[1]], x, [bias]), functional.linear(x, weights[1], bias))


@needs_kernel
@pytest.mark.parametrize("own_inputs", [True, False])
def test_several_matrices_at_once(own_inputs: bool) -> None:
    weights = matrices((1024, 256), 5)
    assert is_exact(weights[0])
    x = inputs(256, 5 if own_inputs else 1)
    found = gemv.multiply(weights, x)
    expected = [functional.linear(row, w) for row, w in zip(x.expand(5, -1), weights, strict=True)]
    assert same_bits(found, torch.stack(expected))


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(64, 64),
        torch.ones(64, 48, dtype=torch.bfloat16),
        torch.ones(64, 64, dtype=torch.bfloat16).T[:, :32],
    ],
    ids=["float32", "columns", "strides"],
)
def test_what_the_kernel_cannot_take_is_left_to_torch(weight: Tensor) -> None:
    prober = Prober()
    assert not gemv.verdict_of(prober, weight).way
    assert prober.gemv.count(native=False) == 1


@needs_kernel
@pytest.mark.parametrize("shape", [(96, 192), (2048, 256)])
def test_other_orders_of_addition_are_found_out(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrices(shape)[0]
    assert is_exact(weight)
    honest = gemv.multiply

    def backwards(weights: list[Tensor], x: Tensor, biases: list[Tensor]) -> Tensor:
        turned = [w.flip(1).contiguous() for w in weights]
        return honest(turned, x.flip(1).contiguous(), biases)

    monkeypatch.setattr(gemv, "multiply", backwards)
    assert not is_exact(weight)


def test_without_the_library_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(binding, "_FOLDER", tmp_path)
    binding.load.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert not is_exact(matrices((192, 256))[0])
        assert binding.obstacle() == binding.NOT_COMPILED
    finally:
        binding.load.cache_clear()
    assert [record.kernel for record in caplog.records] == ["torch"]  # type: ignore[attr-defined]


@needs_kernel
@torch.inference_mode()
def test_linear_layers_keep_their_bits() -> None:
    model = nn.Sequential(
        nn.Linear(256, 512, dtype=torch.bfloat16),
        nn.Linear(512, 40, bias=False, dtype=torch.bfloat16),
        nn.Linear(40, 8, dtype=torch.bfloat16),
    )
    one, many = inputs(256).view(1, 1, 256), inputs(256, 7).view(1, 7, 256)
    before = model(one), model(many)
    adopt(model, Prober())
    assert "forward" not in vars(model[2]), "40 columns are no whole tile"
    assert same_bits(model(one), before[0])
    assert same_bits(model(many), before[1])
    assert isinstance(model[1].forward, OneTokenLinear)
