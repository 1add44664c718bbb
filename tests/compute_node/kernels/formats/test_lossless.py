"""Twelve bits a number: every bf16 comes back, and products have the bits of the matrix itself.

Planted faults seen red: bases of other rows, a base added to exponent 0, outliers of a tile too
late or unlisted, ends not added up, zeros counted as outliers, accumulators of 256 columns, an edge
written beyond its row, one input for all experts, a kernel with other bits trusted (for one token
and for several), shapes unchecked; by torch: outliers of the next block, padding left.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import expert_kernels, gemm, gemv
from compute_node.kernels.formats import lossless
from compute_node.native import binding
from expert_store.offline.formats import lossless as encoder
from proto import errors
from proto.expert import ModelSpec, TensorLayout, Variant
from proto.weight_format import OUTLIERS, WeightFormat, lossless_tensors
from tests.compute_node.kernels.test_gemv import inputs, matrices, needs_kernel, same_bits
from tests.matrices import matrix as bind

pytestmark = pytest.mark.usefixtures("threads")
SHAPES = [(192, 256), (17, 1024), (33, 70), (300, 5120)]


@pytest.fixture(params=["native", "torch"])
def unpacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(binding, "load", lambda: None)
    elif binding.obstacle():
        pytest.skip(binding.obstacle())


def packed(matrix: Tensor, name: str = "w", spare: int = 1) -> dict[str, Tensor]:
    room = encoder.count_outliers(matrix) + spare
    described = lossless_tensors(*matrix.shape, room)
    tensors = encoder.encode(matrix, room)
    assert [tuple(tensor.shape) for tensor in tensors] == [shape for _, _, shape in described]
    return {f"{name}{suffix}": t for (suffix, _, _), t in zip(described, tensors, strict=True)}


def packed_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        part: array
        for name, matrix in tensors.items()
        for part, array in packed(matrix, name).items()
    }


@pytest.mark.usefixtures("unpacking")
def test_every_number_comes_back() -> None:
    """All 65,536 of them, in rows of few exponents and in rows of all."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    for matrix in (every.view(256, 256), every.view(256, 256).T.contiguous()):
        assert same_bits(lossless.unpack(packed(matrix), "w", (256, 256)), matrix)


@pytest.mark.usefixtures("unpacking")
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_come_back(shape: tuple[int, int]) -> None:
    """With numbers far off, rows of zeros, and edges that fill no tile."""
    (matrix,) = matrices(shape)
    matrix[0, :3] = torch.tensor([1e30, -1e-30, float("inf")]).bfloat16()
    matrix[1] = 0
    matrix[-1, -1] = 1e-25
    assert encoder.count_outliers(matrix) >= 4
    assert same_bits(lossless.unpack(packed(matrix), "w", shape), matrix)


@needs_kernel
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 32 == 0])
def test_products_have_the_bits_of_the_matrix(shape: tuple[int, int]) -> None:
    plain = matrices(shape, 3)
    plain[0][3, 5], plain[2][-1, -1] = 1e-20, 1e3
    experts = [packed(matrix) for matrix in plain]
    biases = [torch.randn(shape[0]).bfloat16() for _ in experts]
    bound = bind("lossless", experts[0], shape).native
    assert bound.of_one_token(experts[0]).way
    for rows in (inputs(shape[1]), inputs(shape[1], 3)):
        found = bound.multiply(experts, rows)
        assert same_bits(found, gemv.multiply(plain, rows))
        with_bias = [
            tensors | {"w_bias": bias} for tensors, bias in zip(experts, biases, strict=True)
        ]
        found = bind("lossless", with_bias[0], shape).native.multiply(with_bias, rows)
        assert same_bits(found, gemv.multiply(plain, rows, biases))


@needs_kernel
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 32 == 0])
def test_products_of_several_tokens_have_the_bits_of_the_matrix(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix is unpacked once, to try the kernel out. The portable one takes even numbers."""
    plain = matrices(shape, 2)[1]
    plain[3, 5], plain[-1, -1], plain[0] = 1e-20, 1e3, 0
    tensors, bias = packed(plain), torch.randn(shape[0]).bfloat16()
    for num_tokens in (2, 5, 12, 33):
        x = inputs(shape[1], num_tokens)
        for b, stored in ((None, tensors), (bias, tensors | {"w_bias": bias})):
            bound = bind("lossless", stored, shape)
            is_taken = bound.native.step_of(stored, num_tokens) > 0
            assert is_taken or (binding.isa() == binding.PORTABLE and num_tokens != 12)
            with monkeypatch.context() as patched:
                if is_taken:
                    patched.setattr(lossless, "unpack", None)
                found = bound.linear(stored, x)
            assert same_bits(found, functional.linear(x, plain, b))


@needs_kernel
def test_several_tokens_with_other_bits_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = matrices((64, 128))[0], inputs(128, 5)
    right = gemm.multiply_arrays

    def wrong(*args: Any) -> Tensor:
        _, _, is_lossless, *_ = args
        return right(*args).nextafter(torch.ones(1)) if is_lossless else right(*args)

    monkeypatch.setattr(gemm, "multiply_arrays", wrong)
    stored = packed(plain)
    found = bind("lossless", stored, (64, 128)).linear(stored, x)
    assert same_bits(found, functional.linear(x, plain))


@needs_kernel
def test_a_kernel_with_other_bits_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = packed(matrices((64, 128))[0])
    right = lossless.NativeLossless.multiply

    def wrong(*args: Any) -> Tensor:
        return right(*args).nextafter(torch.ones(1))

    monkeypatch.setattr(lossless.NativeLossless, "multiply", wrong)
    assert not bind("lossless", tensors, (64, 128)).native.of_one_token(tensors).way


def test_trained_weights_have_few_outliers() -> None:
    """What makes it worth its while: three quarters of the bytes, and little beside them."""
    matrix = (torch.randn(256, 1024) * 0.02).bfloat16()
    assert encoder.count_outliers(matrix) < matrix.numel() / 1000
    assert encoder.count_outliers(torch.zeros_like(matrix)) == 0
    stored = sum(tensor.numel() * tensor.itemsize for tensor in packed(matrix).values())
    assert stored < 0.76 * 2 * matrix.numel()


def test_records_of_other_shapes_are_refused() -> None:
    parameter = torch.empty(4, 96, 64, dtype=torch.bfloat16, device="meta")
    module = SimpleNamespace(
        is_transposed=False, w=parameter, named_parameters=lambda recurse: [("w", parameter)]
    )
    layout = tuple(TensorLayout(f"w{s}", d, shape) for s, d, shape in lossless_tensors(96, 64, 7))
    spec = ModelSpec("", "toy", (1,), 4, 2, {1: layout}, weight_format=WeightFormat("lossless"))
    expert_kernels.check(spec.variant("exact"), {1: module})
    for number, tensor in enumerate(layout):
        others = (*layout[:number], *layout[number + 1 :])
        changed = [others]
        if not tensor.name.endswith(OUTLIERS):  # of these there may be any number
            shorter = replace(tensor, shape=(tensor.shape[0] - 1, *tensor.shape[1:]))
            changed.append((*others, shorter))
        for found in changed:
            with pytest.raises(
                errors.ManifestInvalid, match=rf"layer 1: \['{tensor.name}'\] are not"
            ):
                expert_kernels.check(Variant(spec.weight_format, {1: found}), {1: module})
