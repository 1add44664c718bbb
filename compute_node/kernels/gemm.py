"""Products of several tokens with a bf16 matrix: by native gemm where it gives torch's own bits,
which is found out for each shape and number of tokens on this machine.

oneDNN generates a kernel for every number of tokens an expert happens to get, which takes longer
than most of the products themselves, and a node has no memory to keep them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import gemv
from compute_node.kernels.prober import Prober
from compute_node.kernels.verdicts import Key, Verdict, same_bits
from compute_node.native import binding

_TILE_COLUMNS = 32
MAX_WORK = 1 << 31  # multiplications, 10 ms; generating a kernel for more is a small part of it
_MAX_IDLE_WORK = 1 << 29  # multiplications; a request waits for the product under way
_WHOLE_COLUMNS, _BLOCK_COLUMNS = 384, 768  # oneDNN's blocks without bf16 instructions
_LEAST_TOKENS = 4  # of which a portable product is no slower
_STEPS = (1024, 512, 2048, 4096)  # oneDNN starts a new accumulator after 1024; 512 for one token
_MIXED_TOKENS = 17  # from this many on, one product tries out every kind of input
_POOL_NUMBERS = 1 << 21  # larger matrices are tried out as they are


def verdict_of(
    prober: Prober,
    num_tokens: int,
    weight: Tensor,
    bias: Tensor | None = None,
    max_work: float | None = None,
) -> Verdict:
    """Of matrices [N, K] of this shape and this many tokens: after how many columns `multiply` has
    to start a new accumulator to give torch's bits. The first of them is tried out.

    max_work: multiplications beyond which torch computes, untried; None: 10 ms of them
    """
    most = MAX_WORK if max_work is None else max_work
    if num_tokens * weight.numel() > most:
        return Verdict(0)
    key = _key(num_tokens, weight, bias)
    return prober.gemm.ask(key, lambda: _prove(prober, num_tokens, weight, bias))


def is_put_off(
    prober: Prober,
    num_tokens: int,
    shape: tuple[int, int],
    bias: Tensor | None,
    then: Callable[[], object],
) -> bool:
    """Whether `verdict_of` bf16 matrices of this shape has to wait until the node is idle; `then`
    is called when it was found. Portable entries make a prompt a quarter faster, but trying out
    every number of tokens would make a node's first prompt take three times as long.
    """
    if binding.isa() != binding.PORTABLE or binding.setting() == binding.PORTABLE:
        return False
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    key, bias = _key(num_tokens, weight, bias), None if bias is None else bias.clone()
    if key in prober.gemm.known:
        return False
    if num_tokens * weight.numel() <= _MAX_IDLE_WORK and _steps_to_try(num_tokens, shape[1]):
        prober.put_off("gemm", key, lambda: _prove(prober, num_tokens, weight, bias), then)
    return True


def _key(num_tokens: int, weight: Tensor, bias: Tensor | None) -> Key:
    shape = (weight.shape[0], weight.shape[1])
    return num_tokens, shape, weight.dtype, bias is not None, torch.get_num_threads()


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
    """inputs: [t, K], contiguous; weight: [N, K], contiguous, K a multiple of 32.

    step: columns after which a new accumulator starts

    Returns [t, N].
    """
    return multiply_arrays(inputs, [weight], False, weight.shape[0], bias, step)


def multiply_arrays(
    inputs: Tensor,
    arrays: Sequence[Tensor],
    is_lossless: bool,
    num_outputs: int,
    bias: Tensor | None,
    step: int,
) -> Tensor:
    """The same with a matrix of either kind. arrays: the matrix, or those of native lossless."""
    num_tokens, num_inputs = inputs.shape
    outputs = torch.empty((num_tokens, num_outputs), dtype=torch.bfloat16)
    binding.kernels().gemm(
        gemv.addresses(arrays),
        is_lossless,
        None if bias is None else bias.data_ptr(),
        inputs.data_ptr(),
        outputs.data_ptr(),
        num_tokens,
        num_outputs,
        num_inputs,
        step,
        gemv.parallel(),
        torch.get_num_threads(),
    )
    return outputs


def can_take(inputs: Tensor) -> bool:
    """inputs: [t, K]"""
    return inputs.dtype == torch.bfloat16 and inputs.shape[0] > 1 and inputs.is_contiguous()


def _can_take(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.shape[1] % _TILE_COLUMNS == 0
        and weight.is_contiguous()
        and binding.load() is not None
    )


@torch.no_grad()
def _prove(prober: Prober, num_tokens: int, weight: Tensor, bias: Tensor | None) -> Verdict:
    if not _can_take(weight):
        return Verdict(0)
    if weight.numel() <= _made_up_limit():  # a real one may be mostly zeros, which prove nothing
        weight = _made_up(weight.shape)
    elif binding.isa() == binding.PORTABLE:
        return Verdict(0)
    step = _find_step(prober, num_tokens, weight, bias)
    if not step or binding.isa() != binding.PORTABLE:  # elsewhere generating a kernel takes longest
        return Verdict(step)
    inputs = torch.ones((num_tokens, weight.shape[1]), dtype=torch.bfloat16)
    ratio = prober.ratio(
        lambda: multiply(inputs, weight, bias, step),
        lambda: functional.linear(inputs, weight, bias),
    )
    return Verdict(step, ratio)


def _find_step(prober: Prober, num_tokens: int, weight: Tensor, bias: Tensor | None) -> int:
    """The first that gives torch's bits; 0: none does."""
    steps, expected = _steps_to_try(num_tokens, weight.shape[1]), []
    for inputs, scaled in _probes(num_tokens, weight, bias) if steps else ():
        prober.give_way()
        expected.append((inputs, scaled, functional.linear(inputs, weight, scaled)))
    for step in steps:
        if all(
            same_bits(multiply(inputs, weight, scaled, step), found)
            for inputs, scaled, found in expected
        ):
            return step
    return 0


def _steps_to_try(num_tokens: int, columns: int) -> list[int]:
    """Where oneDNN may start a new accumulator, for the instruction set in charge."""
    if binding.isa() == binding.PORTABLE:  # it halves what is shorter than two blocks
        if num_tokens < _LEAST_TOKENS or (num_tokens % 2 and torch.get_num_threads() > 1):
            return []  # it parts odd numbers among threads in such a way that one has its own order
        half = columns // 2 if columns > _WHOLE_COLUMNS else columns
        step = half if columns < 2 * _BLOCK_COLUMNS else _BLOCK_COLUMNS
        return [] if step % _TILE_COLUMNS else [step]
    return [step for step in _STEPS if step < columns] or [columns]


def _probes(
    num_tokens: int, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs [t, K] and what becomes of the bias: what `gemv.probes` has, all in one where there
    is no bias to scale: a row of each kind in turn, the last one of rounding errors alone, where
    another order of additions shows best.
    """
    if bias is not None or num_tokens < _MIXED_TOKENS:
        for inputs, scale in gemv.probes(weight, torch.Generator().manual_seed(0), num_tokens):
            yield inputs, None if bias is None else bias * scale
        return
    kinds = list(gemv.probes(weight, torch.Generator().manual_seed(0), _MIXED_TOKENS))
    mixed = torch.stack([inputs for inputs, _ in kinds], dim=1).flatten(0, 1)  # [68, K]
    first = -num_tokens % len(kinds)
    yield mixed.repeat(num_tokens // len(mixed) + 2, 1)[first : first + num_tokens], None


def _made_up_limit() -> int:
    """Numbers of a matrix. Only rounding errors tell orders apart where nothing is flushed near
    underflow, so larger ones are made up there.
    """
    return gemv.MADE_UP_LIMIT if binding.isa() == binding.PORTABLE else _POOL_NUMBERS


def _made_up(shape: torch.Size) -> Tensor:
    """[N, K] with paired columns; its rows repeat themselves where there are many."""
    if binding.isa() == binding.PORTABLE:  # tried out while idle: nobody waits, so no pool is kept
        return gemv.made_up(shape, torch.Generator().manual_seed(0))
    num_rows = min(shape[0], _POOL_NUMBERS // shape[1])
    rows = _pool()[: num_rows * shape[1]].view(num_rows, shape[1])
    return gemv.pair_columns(rows.repeat(-(-shape[0] // num_rows), 1)[: shape[0]])


@cache
def _pool() -> Tensor:
    """[_POOL_NUMBERS], random."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(_POOL_NUMBERS, dtype=torch.bfloat16).normal_(generator=generator)
