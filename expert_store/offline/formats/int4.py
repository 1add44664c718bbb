"""Four bits a weight, with a scale and a zero for each group of inputs. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.parameters import EXPERT_DTYPES, ExpertParameter
from expert_store.offline.formats.low_bit import LowBitEncoder, rounded
from proto import errors
from proto.weight_format import BLOCK_ROWS, INT4_GROUPS, INT4_OUTPUTS, WeightFormat

# A group's range is where the search for its scale starts: all of it, and most of it, outliers
# clipped. Measured (tests/bench/LOG.md): more starts or rounds gain less than a hundredth.
_STARTS = (1.0, 0.8)
_ROUNDS = 8
_ROWS_AT_ONCE = 256
_LAYOUTS = {"AVX512": "blocks64", "AVX2": "blocks32"}


class Int4Encoder(LowBitEncoder):
    """A scale and a zero for each group of inputs."""

    def __init__(self, architecture: Architecture) -> None:
        inputs = {p.outputs_and_inputs[1] for p in architecture.matrices}
        fitting = [g for g in INT4_GROUPS if all(count % g == 0 for count in inputs)]
        group = fitting[0] if fitting else INT4_GROUPS[-1]
        self.weight_format = WeightFormat("int4", group, layout_here(), lossy=True)
        self.contents = (
            "Each matrix of an expert is kept as 4-bit codes with a scale and a zero for each "
            f"{group}\ninputs of an output, chosen for the least squared error."
        )

    def _tensors(self, parameter: ExpertParameter, matrix: Tensor) -> Iterable[Tensor]:
        group, layout = self.weight_format.group, self.weight_format.layout
        return quantise(matrix, group, layout, EXPERT_DTYPES[parameter.dtype])


def layout_here() -> str:
    """What torch's int4 kernel reads on this CPU. Raises CheckpointUnsupported when it has none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _LAYOUTS:
        raise errors.CheckpointUnsupported(
            f"this CPU ({capability}) has no int4 kernel: pack with --format int8 or bf16"
        )
    return _LAYOUTS[capability]


def quantise(weight: Tensor, group: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale and a zero for each `group` inputs of a row, chosen for the least squared error.

    weight: [N, K]

    Returns packed codes [N padded to 64s, K padded to groups / 2] uint8 and scales with zeros
    [K padded / group, N padded, 2] of `dtype`.
    """
    num_outputs, num_inputs = weight.shape
    padding = (0, -num_inputs % group, 0, -num_outputs % INT4_OUTPUTS)
    padded = functional.pad(weight, padding)
    num_pieces = -(-num_outputs // _ROWS_AT_ONCE)
    fitted = [_fit(rows, group, dtype) for rows in padded.chunk(num_pieces)]
    codes, scale, zero = (torch.cat(pieces) for pieces in zip(*fitted, strict=True))
    scale_zero = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
    return pack_codes(codes, BLOCK_ROWS[layout]), scale_zero.to(dtype)


def pack_codes(codes: Tensor, block_rows: int) -> Tensor:
    """Two codes a byte, as proto/weight_format.py lays them. codes: [N, K] uint8; returns
    [N, K / 2].
    """
    num_outputs, num_inputs = codes.shape
    blocks = codes.view(-1, block_rows, num_inputs).transpose(1, 2).contiguous()  # [N / B, K, B]
    low, high = blocks.chunk(2, dim=-1)
    return (low | high << 4).reshape(num_outputs, num_inputs // 2)


def _fit(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] uint8, scales and zeros [N, K / group] of rows [N, K]."""
    num_outputs = weight.shape[0]
    values = weight.float().reshape(-1, group)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    starts = [(high - low) * share / 15 for share in _STARTS]
    fits = [_refine(values, start, (high + low) / 2, dtype) for start in starts]
    errors_by_fit = torch.cat([_squared_error(values, *fit) for fit in fits], dim=1)
    best = errors_by_fit.argmin(dim=1, keepdim=True)  # [G, 1]
    scale, zero = (torch.cat(found, dim=1).gather(1, best) for found in zip(*fits, strict=True))
    codes = (_codes(values, scale, zero) + 8).to(torch.uint8)
    by_row = (num_outputs, -1)
    return codes.view(by_row), scale.view(by_row), zero.view(by_row)


def _squared_error(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[G, 1]"""
    found = _codes(values, scale, zero) * scale + zero
    return (found - values).square_().sum(dim=1, keepdim=True)


def _refine(
    values: Tensor, scale: Tensor, middle: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes for the scales, then scales for the codes by least squares, in turns.

    values: [G, group]; scale, middle: [G, 1]

    Returns scales and zeros [G, 1], as they are once rounded to `dtype`.
    """
    mean = values.mean(dim=1, keepdim=True)
    centred = values - mean
    scale = rounded(scale, torch.float32)
    zero = middle + scale / 2
    for _ in range(_ROUNDS):
        codes = _codes(values, scale, zero)
        offset = codes - codes.mean(dim=1, keepdim=True)
        spread = torch.linalg.vecdot(offset, offset)[:, None]
        slope = torch.linalg.vecdot(offset, centred)[:, None] / spread
        scale = torch.where(slope > 0, slope, scale)  # a group of one value has no slope
        zero = mean - scale * codes.mean(dim=1, keepdim=True)
    return rounded(scale, dtype), zero.to(dtype).float()


def _codes(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[G, group] float32, whole numbers from -8 to 7."""
    return ((values - zero) / scale).round_().clamp_(-8, 7)
