"""bf16 matrices in twelve bits a number, as proto/weight_format.py lays them out. Offline, imports
torch.

Trained weights of a row have few exponents: fifteen neighbouring ones are named in four bits, and
what lies farther off, one in ten thousand, in a list.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from proto.weight_format import TILE_COLUMNS, TILE_ROWS

_NUM_EXPONENTS = 256
_NUM_CODES = 15  # beside 0, which says that the exponent is 0
_PLACE_BITS = 24


def count_outliers(matrix: Tensor) -> int:
    """How many numbers of a matrix [N, K] bf16 have an exponent that no code names."""
    counts, bases = _choose_bases(_exponents(matrix))
    windows = _windows(counts).gather(1, bases[:, None])
    return int(counts.sum() - windows.sum())


def encode(matrix: Tensor, num_outliers: int) -> tuple[Tensor, ...]:
    """matrix: [N, K] bf16; num_outliers: room for so many

    Returns what `proto.weight_format.lossless_tensors` names, in that order.
    """
    num_outputs, num_inputs = matrix.shape
    padding = (0, -num_inputs % TILE_COLUMNS, 0, -num_outputs % TILE_ROWS)
    padded = functional.pad(matrix, padding)
    exponents = _exponents(padded)
    _, bases = _choose_bases(exponents)
    codes = exponents - bases.to(torch.uint8)[:, None]  # wraps: what lies below is large
    is_coded = (codes >= 1) & (codes <= _NUM_CODES) & (exponents > 0)
    is_outlier = ~is_coded & (exponents > 0)
    codes = codes.mul_(is_coded)
    bits = padded.view(torch.int16)
    signs = (bits >> 8 & 0x80) | bits & 0x7F
    pairs = _in_tiles(codes).view(-1, 2)
    ends, outliers = _list_outliers(is_outlier, exponents, num_outliers)
    return (
        _in_tiles(signs.to(torch.uint8)).view(padded.shape),
        (pairs[:, 0] | pairs[:, 1] << 4).view(padded.shape[0], -1),
        bases.to(torch.uint8),
        ends,
        outliers,
    )


def _exponents(matrix: Tensor) -> Tensor:
    """[N, K] uint8, biased."""
    return (matrix.contiguous().view(torch.int16) >> 7).to(torch.uint8)


def _choose_bases(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """How often each exponent but 0 occurs, [N, 256], and the base that names most of them, [N]."""
    counts = torch.zeros(exponents.shape[0], _NUM_EXPONENTS, dtype=torch.int32)
    counts.scatter_add_(1, exponents.long(), torch.ones(1, dtype=torch.int32).expand_as(exponents))
    counts[:, 0] = 0
    return counts, _windows(counts).argmax(dim=1)


def _windows(counts: Tensor) -> Tensor:
    """[N, 241]: how many numbers each base names: exponents base + 1 to base + 15."""
    below = counts.cumsum(dim=1)  # [N, 256], up to and with each exponent
    return below[:, _NUM_CODES:] - below[:, :-_NUM_CODES]


def _in_tiles(numbers: Tensor) -> Tensor:
    """[N, K] to [N / 16, K / 32, 512], as the kernel unpacks them."""
    blocks, tiles = numbers.shape[0] // TILE_ROWS, numbers.shape[1] // TILE_COLUMNS
    split = numbers.view(blocks, 4, 4, tiles, 8, 2, 2)  # block, i, r, tile, q, h, p
    return split.permute(0, 3, 4, 1, 5, 2, 6).reshape(blocks, tiles, -1)


def _list_outliers(is_outlier: Tensor, exponents: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Where each block's end among them, [N / 16] int32, and the outliers, [room] int32."""
    found = _in_tiles(is_outlier).flatten(1)  # [N / 16, 16 K]
    blocks, places = found.nonzero(as_tuple=True)
    ends = found.sum(dim=1).cumsum(dim=0)
    outliers = torch.zeros(room, dtype=torch.int64)
    far_off = _in_tiles(exponents).flatten(1)[blocks, places].long()
    outliers[: len(places)] = places | far_off << _PLACE_BITS
    return ends.int(), outliers.to(torch.uint32).view(torch.int32)
