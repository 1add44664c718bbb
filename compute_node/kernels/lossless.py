"""Products with bf16 matrices kept in twelve bits a number, bit for bit those with the matrices
themselves: by native kernels as they lie, or unpacked for torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import gemm, gemv, matrices, scratch
from compute_node.kernels.prober import LOSSLESS_GEMM, LOSSLESS_GEMV
from compute_node.native import binding
from proto.expert import ModelSpec, TensorLayout
from proto.weight_format import BASES, CODES, OUTLIER_ENDS, OUTLIERS, lossless_tensors

_PARTS = ("", CODES, BASES, OUTLIER_ENDS, OUTLIERS)  # as native lossless has them
_PLACE_BITS = 24


def is_packed(tensors: Mapping[str, Tensor], name: str) -> bool:
    return name + BASES in tensors


def arrays_of(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """What kernels for either kind take of matrix `name`: itself, or the arrays of a packed one."""
    parts = _PARTS if is_packed(tensors, name) else ("",)
    return [tensors[name + part] for part in parts]


def is_exact(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> bool:
    """Whether `multiply` gives torch's bits for matrices [N, K] of this shape, with as many threads
    as torch has now. The first of a shape is tried out.
    """
    bias = tensors.get(f"{name}_bias")
    key = (shape, bias is not None, torch.get_num_threads())
    verdict = LOSSLESS_GEMV.known.get(key)
    if verdict is None:
        verdict = LOSSLESS_GEMV.prove(key, lambda: _gives_same_bits(tensors, name, shape, bias))
    return verdict > 0


def multiply(
    experts: Sequence[Mapping[str, Tensor]], name: str, inputs: Tensor, num_outputs: int
) -> Tensor:
    """Matrix `name` of several experts at once; `is_exact` of them must be true.

    inputs: [E, K], a row for each expert, or [1, K], one for all

    Returns [E, N].
    """
    biases = [tensors[f"{name}_bias"] for tensors in experts if f"{name}_bias" in tensors]
    outputs = torch.empty((len(experts), num_outputs), dtype=torch.bfloat16)
    binding.kernels().lossless_gemv(
        gemv.addresses([array for tensors in experts for array in arrays_of(tensors, name)]),
        gemv.addresses(biases) if biases else None,
        len(experts),
        inputs.data_ptr(),
        inputs.shape[1] if inputs.shape[0] > 1 else 0,
        outputs.data_ptr(),
        num_outputs,
        inputs.shape[1],
        gemv.parallel(),
        torch.get_num_threads(),
    )
    return outputs


def linear(
    inputs: Tensor, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]
) -> Tensor:
    """functional.linear with matrix `name` and its bias, and its bits. inputs: [t, K]; shape:
    [N, K]. Returns [t, N].
    """
    bias, step = tensors.get(f"{name}_bias"), 0
    if inputs.dtype == torch.bfloat16 and inputs.is_contiguous() and inputs.shape[0] > 1:
        step = step_of(inputs.shape[0], tensors, name, shape)
    if step:
        return gemm.multiply_arrays(inputs, arrays_of(tensors, name), True, shape[0], bias, step)
    return functional.linear(inputs, unpack(tensors, name, shape), bias)


def step_of(
    num_tokens: int, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]
) -> int:
    """`gemm.step_of` for a packed matrix [N, K]. The first of a shape and number of tokens is tried
    out.
    """
    if not gemm.is_tried():
        return 0
    bias = tensors.get(f"{name}_bias")
    key = (num_tokens, shape, bias is not None, torch.get_num_threads())
    step = LOSSLESS_GEMM.known.get(key)
    if step is None:
        step = LOSSLESS_GEMM.prove(key, lambda: _find_step(num_tokens, tensors, name, shape, bias))
    return step


def unpack(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Matrix `name` as [N, K] bf16; valid until the next on this thread."""
    if binding.load() is None:
        return unpack_by_torch(tensors, name, shape)
    weight = scratch.empty(shape, torch.bfloat16)
    binding.kernels().lossless_unpack(
        gemv.addresses(arrays_of(tensors, name)),
        weight.data_ptr(),
        *shape,
        gemv.parallel(),
        torch.get_num_threads(),
    )
    return weight


def unpack_by_torch(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The same on any CPU, in more time and memory."""
    signs, codes = tensors[name], tensors[name + CODES]  # [N, K], [N, K / 2]
    blocks, tiles = signs.shape[0] // 16, signs.shape[1] // 32
    numbers = signs.view(-1, 64).short()  # in the order of the record
    code = torch.stack([codes & 15, codes >> 4], dim=-1).view(numbers.shape)
    bases = tensors[name + BASES].view(blocks, 1, 4, 1, 4, 1)
    bases = bases.expand(-1, tiles * 8, -1, 2, -1, 2).reshape(numbers.shape)
    exponents = torch.where(code == 0, 0, code + bases).view(blocks, -1)  # [blocks, 16 * K]
    ends, outliers = tensors[name + OUTLIER_ENDS], tensors[name + OUTLIERS].long() & 0xFFFFFFFF
    outliers = outliers[: int(ends[-1])]
    block = torch.bucketize(torch.arange(len(outliers)), ends, right=True)
    exponents[block, outliers & (1 << _PLACE_BITS) - 1] = (outliers >> _PLACE_BITS).to(torch.uint8)
    bits = (numbers & 0x80) << 8 | exponents.view(numbers.shape).short() << 7 | numbers & 0x7F
    rows = bits.view(blocks, tiles, 8, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4, 6)
    return rows.reshape(signs.shape)[: shape[0], : shape[1]].contiguous().view(torch.bfloat16)


def check_format(spec: ModelSpec, modules: Mapping[int, Any]) -> None:
    """modules: model layer number -> experts module

    Raises ManifestInvalid for records that have not the shapes that the modules ask for.
    """
    if spec.weight_format.name == "lossless":
        matrices.check_records(spec, modules, _expected)


def _expected(module: Any, stored: Mapping[str, TensorLayout]) -> Iterator[matrices.Described]:
    """Any number of outliers will do."""
    for name in matrices.names_of(module):
        outliers = stored.get(name + OUTLIERS)
        num_outliers = prod(outliers.shape) if outliers else 1
        for suffix, dtype, shape in lossless_tensors(
            *matrices.shape_of(module, name), num_outliers
        ):
            yield name + suffix, dtype, shape


def _find_step(
    num_tokens: int,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, int],
    bias: Tensor | None,
) -> int:
    """Where gemm has torch's bits, and has them of the packed matrix, too; else 0."""
    weight = unpack(tensors, name, shape)
    step = gemm.step_of(num_tokens, weight, bias, max_work=inf)  # torch would need it unpacked
    if not step:
        return 0
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((num_tokens, shape[1]), generator=generator).bfloat16()
    found = gemm.multiply_arrays(inputs, arrays_of(tensors, name), True, shape[0], bias, step)
    expected = gemm.multiply(inputs, weight, bias, step)
    return step if torch.equal(found.view(torch.int16), expected.view(torch.int16)) else 0


def _gives_same_bits(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int], bias: Tensor | None
) -> bool:
    """Where gemv has torch's bits, and this has gemv's."""
    weight = unpack(tensors, name, shape).clone()
    if not gemv.is_exact(weight, bias):
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((1, shape[1]), generator=generator).bfloat16()
    found = multiply([tensors], name, inputs, shape[0])
    expected = gemv.multiply([weight], inputs, [] if bias is None else [bias])
    return torch.equal(found.view(torch.int16), expected.view(torch.int16))
