"""Low-bit products: the kernel and the dequantised matrix say the same, and say it of these codes.

Planted faults seen red: halves of a byte swapped, padding of inputs or outputs left, scale and zero
swapped, records of other shapes taken, a matrix handed out in the scratch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compute_node.kernels import expert_kernels
from expert_store.offline.formats import int4, int8
from proto import errors
from proto.expert import ModelSpec, TensorLayout, Variant
from proto.weight_format import BLOCK_ROWS, NAMES, SCALE, SCALE_ZERO, WeightFormat, low_bit_tensors
from tests.matrices import dequantised, matrix

SHAPES = [(128, 64), (96, 48), (16, 32), (192, 96), (64, 160)]
DTYPES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def make(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weight = torch.randn(shape) * 0.05
    if kind == "int8":
        codes, scale = int8.quantise(weight, dtype)
        return {"w": codes, "w" + SCALE: scale}
    codes, scale_zero = int4.quantise(weight, 32, int4.layout_here(), dtype)
    return {"w": codes, "w" + SCALE_ZERO: scale_zero}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_and_many_tokens_agree(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row for row; many, bit for bit the product with the dequantised matrix."""
    tensors = make(kind, shape, dtype)
    inputs, bound = torch.randn(5, shape[1]).to(dtype), matrix(kind, tensors, shape, model=dtype)
    expected = inputs @ dequantised(tensors, "w", shape).T
    few = bound.linear(tensors, inputs)
    assert few.shape == expected.shape
    assert (few - expected).norm() <= DTYPES[dtype] * expected.norm()
    monkeypatch.setattr(bound, "few_tokens", 4)
    many = bound.linear(tensors, inputs)
    torch.testing.assert_close(many, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_codes_lie_as_torch_lays_them() -> None:
    """Every code at its own place: the kernel reads what torch's own packing makes."""
    codes = torch.randint(0, 16, (192, 64), dtype=torch.uint8)
    rows = BLOCK_ROWS[int4.layout_here()]
    theirs = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    assert torch.equal(int4.pack_codes(codes, rows), theirs)
    scale_zero = torch.tensor([1.0, 0.0]).expand(2, 192, 2).contiguous()
    found = dequantised({"w": theirs, "w" + SCALE_ZERO: scale_zero}, "w", (192, 64))
    assert torch.equal(found, codes.float() - 8)


def test_a_dequantised_matrix_outlives_the_next() -> None:
    """It is not the scratch that the next is written to."""
    first = dequantised(make("int4", (64, 64), torch.float32), "w", (64, 64))
    before = first.clone()
    dequantised(make("int4", (64, 64), torch.float32), "w", (64, 64))
    assert torch.equal(first, before)


def spec_of(weight_format: WeightFormat, module: torch.nn.Module) -> ModelSpec:
    layout = tuple(
        TensorLayout(name + suffix, dtype, shape)
        for name, (outputs, inputs) in {"gate_up_proj": (96, 64), "down_proj": (64, 48)}.items()
        for suffix, dtype, shape in low_bit_tensors(weight_format, outputs, inputs, "BF16")
    )
    return ModelSpec("", "toy", (1,), 4, 2, {1: layout}, weight_format=weight_format)


@pytest.fixture(params=[False, True], ids=["", "transposed"])
def module(request: pytest.FixtureRequest) -> torch.nn.Module:
    made = torch.nn.Module()
    made.is_transposed = request.param
    for name, (outputs, inputs) in {"gate_up_proj": (96, 64), "down_proj": (64, 48)}.items():
        shape = (inputs, outputs) if request.param else (outputs, inputs)
        parameter = torch.nn.Parameter(torch.empty(4, *shape, dtype=torch.bfloat16, device="meta"))
        made.register_parameter(name, parameter)
    return made


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_records_of_other_shapes_are_refused(kind: str, module: torch.nn.Module) -> None:
    """They would be read beyond their end: torch's kernels do not look."""
    group = 32 if kind == "int4" else 0
    found = WeightFormat(kind, group, int4.layout_here() if group else "", lossy=True)
    spec = spec_of(found, module)
    expert_kernels.check(spec.variant("exact"), {1: module})
    for number, tensor in enumerate(spec.layouts[1]):
        shorter = replace(tensor, shape=(tensor.shape[0] - 1, *tensor.shape[1:]))
        layout = (*spec.layouts[1][:number], shorter, *spec.layouts[1][number + 1 :])
        with pytest.raises(errors.ManifestInvalid, match=rf"layer 1: \['{tensor.name}'\]"):
            expert_kernels.check(Variant(found, {1: layout}), {1: module})


def test_every_format_has_a_class() -> None:
    assert set(expert_kernels.MATRICES) == set(NAMES)
