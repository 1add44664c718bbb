"""Products of one token with bf16 matrices: by native gemv wherever it gives torch's own bits,
which is found out for each shape on this machine.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels.prober import Prober
from compute_node.kernels.verdicts import Verdict, same_bits
from compute_node.native import binding

_TILE_COLUMNS = 32
_NUM_DRAWS = 4
_TRIED_OUTPUTS = 1024  # of a kernel whose order of additions is torch's, all agree
MADE_UP_LIMIT = 1 << 24  # numbers; a larger matrix is tried out as it is, a few times
_PAIRED_ROWS = 256
_COMPARED_OUTPUTS = 1 << 16  # one in 10,000 differs in another order of additions
# Sums of this size lose bits to flushing whenever they pass zero: another order of additions, and
# nearly every output differs.
_NEAR_UNDERFLOW = 2.0**-121
_LEAST_INPUT = 2.0**-124
_MAPPINGS = Path("/proc/self/maps")


def verdict_of(prober: Prober, weight: Tensor, bias: Tensor | None = None) -> Verdict:
    """On `multiply` of matrices [N, K] of this shape, with as many threads as torch has now. The
    first of a shape is tried out and logged.
    """
    shape, dense = (weight.shape[0], weight.shape[1]), weight.is_contiguous()
    key = (shape, weight.dtype, dense, bias is not None, torch.get_num_threads())
    return prober.gemv.ask(key, lambda: _prove(prober, weight, bias))


def multiply(weights: Sequence[Tensor], inputs: Tensor, biases: Sequence[Tensor] = ()) -> Tensor:
    """Several matrices at once; `verdict_of` them must have a way.

    weights: E times [N, K]
    inputs:  [E, K], a row for each matrix, or [1, K], one for all
    biases:  none, or E times [N]

    Returns [E, N].
    """
    count, (num_outputs, num_inputs) = len(weights), weights[0].shape
    outputs = torch.empty((count, num_outputs), dtype=torch.bfloat16)
    binding.kernels().gemv(
        addresses(weights),
        addresses(biases) if biases else None,
        count,
        inputs.data_ptr(),
        num_inputs if inputs.shape[0] > 1 else 0,
        outputs.data_ptr(),
        num_outputs,
        num_inputs,
        parallel(),
        torch.get_num_threads(),
    )
    return outputs


def multiply_one(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """One matrix [N, K], of which `verdict_of` must have a way, and one token.

    inputs: [..., K], contiguous, one token in all; bias: [N]

    Returns [..., N].
    """
    num_outputs, num_inputs = weight.shape
    output = torch.empty((*inputs.shape[:-1], num_outputs), dtype=torch.bfloat16)
    binding.kernels().gemv_one(
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        inputs.data_ptr(),
        output.data_ptr(),
        num_outputs,
        num_inputs,
        parallel(),
        torch.get_num_threads(),
    )
    return output


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@cache
def parallel() -> int | None:
    """The entry of torch's own OpenMP runtime: its threads are there already, and a second pool
    would fight them for the cores. None: torch brought another runtime, one thread multiplies.
    """
    folder = str(Path(torch.__file__).parent.parent)
    paths = {line.split(maxsplit=5)[-1] for line in _MAPPINGS.read_text().splitlines()}
    for path in sorted(paths):
        if path.startswith(folder) and "/libgomp" in path:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    return None


def _can_take(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[1] % _TILE_COLUMNS == 0
        and binding.load() is not None
    )


@torch.no_grad()
def _prove(prober: Prober, weight: Tensor, bias: Tensor | None) -> Verdict:
    if not _can_take(weight) or not _gives_same_bits(weight, bias):
        return Verdict(0)
    inputs = torch.ones((1, weight.shape[1]), dtype=torch.bfloat16)
    ratio = prober.ratio(
        lambda: multiply_one(weight, inputs, bias),
        lambda: functional.linear(inputs, weight, bias),
    )
    return Verdict(1, ratio)


def _gives_same_bits(weight: Tensor, bias: Tensor | None) -> bool:
    generator = torch.Generator().manual_seed(0)
    num_draws = 1
    if weight.numel() <= MADE_UP_LIMIT:  # a real one may be mostly zeros, which prove nothing
        weight = made_up(weight.shape, generator)
        num_draws = min(_NUM_DRAWS, -(-_TRIED_OUTPUTS // weight.shape[0]))
    elif binding.isa() == binding.PORTABLE:  # nothing is flushed that would tell orders apart
        num_draws = -(-_COMPARED_OUTPUTS // weight.shape[0])
    for _ in range(num_draws):
        for inputs, scale in probes(weight, generator):
            scaled = None if bias is None else bias * scale
            expected = functional.linear(inputs, weight, scaled)
            found = multiply([weight], inputs, [] if scaled is None else [scaled])
            if not same_bits(expected, found):
                return False
    return True


def made_up(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """[N, K] with paired columns; its rows repeat themselves where there are many."""
    rows = torch.empty((min(shape[0], _TRIED_OUTPUTS), shape[1]), dtype=torch.bfloat16)
    rows = pair_columns(rows.normal_(generator=generator))
    return rows.repeat(-(-shape[0] // len(rows)), 1)[: shape[0]]


def probes(
    weight: Tensor, generator: torch.Generator, num_tokens: int = 1
) -> Iterator[tuple[Tensor, float]]:
    """Inputs [t, K] that tell orders of additions apart, and what to scale a bias by. The last
    leaves nothing but rounding errors of a product with `pair_columns`.
    """
    shape = (num_tokens, weight.shape[1])
    typical_output = float(weight[:64].float().std()) * math.sqrt(shape[1])
    tiny = max(_LEAST_INPUT, _NEAR_UNDERFLOW / max(typical_output, _NEAR_UNDERFLOW))
    normal = torch.randn(shape, generator=generator)
    exponents = torch.randint(-40, 40, shape, generator=generator)
    yield normal.bfloat16(), 1.0
    yield normal.mul(tiny).bfloat16(), _NEAR_UNDERFLOW
    yield normal.mul(torch.exp2(exponents.float())).bfloat16(), 1.0
    undone = normal.clone()
    first, second = _pairs(shape[1])
    undone[:, second] = -undone[:, first]
    yield undone.bfloat16(), 0.0


def pair_columns(weight: Tensor) -> Tensor:
    """The same matrix [N, K], with every column in it twice, far apart. K is even."""
    first, second = _pairs(weight.shape[1])
    for at in range(0, len(weight), _PAIRED_ROWS):  # some at a time: the copy takes memory
        rows = weight[at : at + _PAIRED_ROWS]
        rows[:, second] = rows[:, first]
    return weight


def _pairs(num_columns: int) -> tuple[Tensor, Tensor]:
    """[K / 2] each, which column is the same as which."""
    order = torch.randperm(num_columns, generator=torch.Generator().manual_seed(1))
    first, second = order.view(2, -1)
    return first, second
