"""What one box's sum makes, another's takes.

Planted faults seen red: rows made in the order in which experts came, rows taken for other experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compute_node.moe.sums import OneTokenSum, check_rows
from proto import errors


class Adds:
    """Kernels that add up, as eager does, and compute nothing."""

    def add_up(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows[:1])
        for row in rows:
            total += row
        return total


class Kernels:
    exact = Adds()


def sum_with(rows: dict[int, Tensor]) -> OneTokenSum:
    """Whose experts came in this order."""
    hidden = torch.zeros(1, 4, dtype=torch.bfloat16)
    total = OneTokenSum(Kernels(), hidden, dict.fromkeys((1, 4, 6), 0.3))  # type: ignore[arg-type]
    for expert, row in rows.items():
        total.take([expert], row)
    return total


def test_rows_go_to_their_experts_in_whatever_order_they_came() -> None:
    dice = torch.Generator().manual_seed(1)
    rows = {e: torch.randn(1, 4, generator=dice).bfloat16() for e in (1, 4, 6)}
    there = sum_with({6: rows[6], 1: rows[1]})
    made = there.made([1, 6])
    assert torch.equal(made, torch.cat([rows[1], rows[6]]))
    here = sum_with({4: rows[4]})
    here.take([1, 6], made)
    assert torch.equal(here.result(), sum_with(rows).result())


def test_another_number_of_rows_is_refused() -> None:
    with pytest.raises(errors.MessageInvalid, match="made 3 rows, not 2"):
        check_rows(torch.zeros(3, 4), 2)
