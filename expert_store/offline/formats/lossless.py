"""bf16 matrices in twelve bits a number, as proto/weight_format.py lays them out. Imports torch.

Trained weights of a row have few exponents: fifteen neighbouring ones are named in four bits, and
what lies farther off, one in ten thousand, in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.checkpoint.progress import Report
from expert_store.offline.formats.matrix import MatrixEncoder
from expert_store.offline.formats.weight_source import WeightSource
from proto import errors
from proto.expert import TensorLayout
from proto.weight_format import TILE_COLUMNS, TILE_ROWS, WeightFormat, lossless_tensors

_NUM_EXPONENTS = 256
_NUM_CODES = 15  # beside 0, which says that the exponent is 0
_PLACE_BITS = 24
_PIECE_NUMBERS = 1 << 18


class LosslessEncoder(MatrixEncoder):
    """bf16 in twelve bits a number. Goes through all experts twice: a record has room for as many
    outliers as the matrix of its kind with most of them.
    """

    weight_format = WeightFormat("lossless")
    contents = "Each matrix of an expert is kept as bfloat16 in twelve bits a number, none lost."

    def __init__(self, architecture: Architecture, source: WeightSource, report: Report) -> None:
        self._room: dict[ExpertParameter, int] = {}
        matrices = architecture.matrices
        _check_bf16(matrices)
        sizes_bytes = [2 * prod(p.shape) * architecture.num_experts for p in matrices]
        for number, parameter in enumerate(matrices, 1):
            counts = [
                count_outliers(source.matrix(parameter, expert))
                for expert in range(architecture.num_experts)
            ]
            self._room[parameter] = max(1, *counts)
            report(sum(sizes_bytes[:number]), sum(sizes_bytes))
        self._check_gain(matrices)

    def _check_gain(self, matrices: Sequence[ExpertParameter]) -> None:
        plain_bytes = sum(2 * prod(parameter.shape) for parameter in matrices)
        packed_bytes = sum(t.length_bytes for p in matrices for t in self._layout(p))
        if packed_bytes >= plain_bytes:
            raise errors.CheckpointUnsupported(
                f"lossless would take {packed_bytes / plain_bytes:.3f} of the experts' bytes: pack "
                "them with --format exact"
            )

    def _layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        described = lossless_tensors(*parameter.outputs_and_inputs, self._room[parameter])
        return tuple(
            TensorLayout(parameter.name + suffix, dtype, shape)
            for suffix, dtype, shape in described
        )

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        return encode(matrix, self._room[parameter])


def _check_bf16(matrices: list[ExpertParameter]) -> None:
    if any(p.encoding != "plain" or p.dtype != "BF16" for p in matrices):
        raise errors.CheckpointUnsupported(
            "lossless is for bf16 experts, this checkpoint has them otherwise: pack it with "
            "--format bf16 or exact"
        )


def count_outliers(matrix: Tensor) -> int:
    """How many numbers of a matrix [N, K] bf16 have an exponent that no code names."""
    return sum(_count(rows) for rows in _pieces(matrix))


def encode(matrix: Tensor, num_outliers: int) -> tuple[Tensor, ...]:
    """matrix: [N, K] bf16; num_outliers: how many there is room for

    Returns what `proto.weight_format.lossless_tensors` names, in that order.
    """
    num_outputs, num_inputs = matrix.shape
    padding = (0, -num_inputs % TILE_COLUMNS, 0, -num_outputs % TILE_ROWS)
    pieces = [_encode_rows(rows) for rows in _pieces(functional.pad(matrix, padding))]
    signs, codes, bases, counts, found = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    outliers = torch.zeros(num_outliers, dtype=torch.int64)
    outliers[: len(found)] = found
    ends = counts.cumsum(dim=0).int()
    return signs, codes, bases, ends, outliers.to(torch.uint32).view(torch.int32)


def _pieces(matrix: Tensor) -> Sequence[Tensor]:
    """Rows [n, K], n a multiple of 16 but in the last: what is made of them stays in the cache."""
    num_rows = max(1, _PIECE_NUMBERS // matrix.shape[1] // TILE_ROWS) * TILE_ROWS
    pieces: Sequence[Tensor] = torch.split(matrix, num_rows)
    return pieces


def _count(rows: Tensor) -> int:
    counts, bases = _choose_bases(_exponents(rows))
    named = _windows(counts).gather(1, bases[:, None])
    return int(counts.sum() - named.sum())


def _encode_rows(rows: Tensor) -> tuple[Tensor, ...]:
    """rows: [n, K], n and K padded

    Returns signs [n, K], codes [n, K / 2], bases [n], how many outliers each block has [n / 16],
    outliers as int64.
    """
    exponents = _exponents(rows)
    _, bases = _choose_bases(exponents)
    codes = exponents - bases.to(torch.uint8)[:, None]  # wraps: what lies below is large
    is_coded = (codes >= 1) & (codes <= _NUM_CODES) & (exponents > 0)
    is_outlier = _in_tiles(~is_coded & (exponents > 0)).flatten(1)  # [n / 16, 16 K]
    bits = rows.view(torch.int16)
    signs = (bits >> 8 & 0x80) | bits & 0x7F
    pairs = _in_tiles(codes.mul_(is_coded)).view(-1, 2)
    blocks, places = is_outlier.nonzero(as_tuple=True)
    far_off = _in_tiles(exponents).flatten(1)[blocks, places].long()
    return (
        _in_tiles(signs.to(torch.uint8)).view(rows.shape),
        (pairs[:, 0] | pairs[:, 1] << 4).view(rows.shape[0], -1),
        bases.to(torch.uint8),
        is_outlier.sum(dim=1),
        places | far_off << _PLACE_BITS,
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
