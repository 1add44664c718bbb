"""Many tokens through several experts in one call of native/prompt.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compute_node.kernels import gemv
from compute_node.kernels.prompt import Prompt
from compute_node.native import binding


class _Expert(ctypes.Structure):
    """As native/prompt.h has it."""

    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("up_step", ctypes.c_int64),
        ("down_step", ctypes.c_int64),
    )


class _Prompt(ctypes.Structure):
    """As native/prompt.h has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("states", "weights", "table", "outputs", "scratch")),
        *(
            (name, ctypes.c_int64)
            for name in ("scratch_numbers", "tokens", "top_k", "hidden", "inner", "lossless")
        ),
    )


@dataclass(frozen=True)
class Share:
    """An expert, and the tokens that chose it.

    up, down: arrays of its matrices
    places:   [t] int64, as `Prompt.places` has them
    up_step, down_step: columns after which a product starts a new accumulator
    """

    up: list[Tensor]
    down: list[Tensor]
    places: Tensor
    up_step: int
    down_step: int


def compute(
    prompt: Prompt, shares: Sequence[Share], table: Tensor, inner: int, is_lossless: bool
) -> None:
    """Write the experts' weighted outputs to `prompt.outputs`. The busiest come first, so that
    threads end together.

    table: of `gate.Gates`; inner: F
    """
    ordered = sorted(shares, key=lambda share: len(share.places), reverse=True)
    threads, (num_tokens, hidden) = torch.get_num_threads(), prompt.hidden.shape
    numbers = len(ordered[0].places) * (2 * hidden + 3 * inner)
    scratch = torch.empty(threads * numbers, dtype=torch.bfloat16)
    arrays = [(gemv.addresses(share.up), gemv.addresses(share.down)) for share in ordered]
    experts = [
        _Expert(
            *map(ctypes.addressof, pair),
            share.places.data_ptr(),
            len(share.places),
            share.up_step,
            share.down_step,
        )
        for share, pair in zip(ordered, arrays, strict=True)
    ]
    described = _Prompt(
        prompt.hidden.data_ptr(),
        prompt.wide_weights.data_ptr(),
        table.data_ptr(),
        prompt.outputs.data_ptr(),
        scratch.data_ptr(),
        numbers,
        num_tokens,
        prompt.wide_weights.shape[1],
        hidden,
        inner,
        is_lossless,
    )
    binding.kernels().prompt_experts(
        ctypes.byref(described),
        (_Expert * len(experts))(*experts),
        len(experts),
        gemv.parallel(),
        threads,
    )
