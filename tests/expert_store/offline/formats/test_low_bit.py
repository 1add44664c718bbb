"""Codes and scales give weights back as well as so few bits can.

Planted faults seen red: no rounds of fitting, the slope of a group of one value, scales of zero,
int8's range too wide, padding that is not zero.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.offline.formats import int4, int8
from proto.weight_format import SCALE, SCALE_ZERO
from tests.matrices import dequantised

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def back_from_int4(weight: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    codes, scale_zero = int4.quantise(weight, group, int4.layout_here(), dtype)
    tensors = {"w": codes, "w" + SCALE_ZERO: scale_zero}
    return dequantised(tensors, "w", (weight.shape[0], weight.shape[1])).float()


def back_from_int8(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    codes, scale = int8.quantise(weight, dtype)
    tensors = {"w": codes, "w" + SCALE: scale}
    return dequantised(tensors, "w", (weight.shape[0], weight.shape[1])).float()


def min_max(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The plain way: sixteen steps from the least to the greatest."""
    values = weight.reshape(-1, group)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = (high - low) / 15
    return (((values - low) / step).round() * step + low).view_as(weight)


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_within_half_a_step(dtype: torch.dtype) -> None:
    """A step of each row's own scale, and the rounding of the result."""
    weight = torch.randn(40, 50) * torch.logspace(-2, 1, 40)[:, None]
    half_step = weight.abs().amax(dim=1, keepdim=True) / 127 / 2
    slack = 1 + 127 * 4 * torch.finfo(dtype).eps
    assert ((back_from_int8(weight, dtype) - weight).abs() <= half_step * slack).all()


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("outliers", [False, True])
def test_int4_beats_min_max(group: int, outliers: bool) -> None:
    weight = torch.randn(64, 256)
    if outliers:
        weight[:, ::50] *= 4
    assert error(back_from_int4(weight, group, torch.float32), weight) < 0.95 * error(
        min_max(weight, group), weight
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_even_values_come_back_exactly(dtype: torch.dtype) -> None:
    """Whatever their order, and not centred."""
    values = torch.arange(16).repeat(4) * 0.25 + 1
    weight = torch.stack([values[torch.randperm(64)] for _ in range(64)])
    assert torch.equal(back_from_int4(weight, 64, dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_groups_of_one_value_come_back(value: float, dtype: torch.dtype) -> None:
    """No spread, no scale: nothing is divided by zero."""
    weight = torch.full((64, 64), value)
    assert torch.equal(back_from_int4(weight, 32, dtype), weight)
    assert (back_from_int8(weight, dtype) - weight).abs().max() <= 0.01 * abs(value)


def test_padding_is_nothing() -> None:
    """Padded outputs and inputs do not touch the real ones."""
    weight = torch.randn(96, 48)
    codes, scale_zero = int4.quantise(weight, 32, int4.layout_here(), torch.float32)
    assert (codes.shape, scale_zero.shape) == ((128, 32), (2, 128, 2))
    whole = dequantised({"w": codes, "w" + SCALE_ZERO: scale_zero}, "w", (128, 64))
    assert whole[96:].abs().max() == 0
    assert torch.equal(whole[:96, :32], back_from_int4(weight[:, :32], 32, torch.float32))
    assert int8.quantise(weight[:, :40], torch.float32)[0].shape == (96, 48)
