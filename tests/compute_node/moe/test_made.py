"""What one box's sum makes, another's takes.

Planted faults seen red: rows made in the order in which experts came, rows taken for other experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compute_node.moe.sums import OneTokenSum, made_of, take_made
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


def sum_with(rows: dict[int, Tensor], chosen: tuple[int, ...] = (1, 4, 6)) -> OneTokenSum:
    """Whose experts came in this order."""
    hidden = torch.zeros(1, 4, dtype=torch.bfloat16)
    total = OneTokenSum(Kernels(), hidden, dict.fromkeys(chosen, 0.3))  # type: ignore[arg-type]
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


def test_each_sequence_takes_its_own() -> None:
    """Of experts that one of them chose, both, or none of them with the first."""
    dice = torch.Generator().manual_seed(1)
    first = {e: torch.randn(1, 4, generator=dice).bfloat16() for e in (1, 4, 6)}
    second = {e: torch.randn(1, 4, generator=dice).bfloat16() for e in (4, 7)}
    rows = made_of([sum_with(first), sum_with(second, (4, 7))], [4, 6, 7])
    assert torch.equal(rows, torch.cat([first[4], first[6], second[4], second[7]]))
    here = [sum_with({1: first[1]}), sum_with({}, (4, 7))]
    take_made(here, [4, 6, 7], rows)
    assert torch.equal(here[0].result(), sum_with(first).result())
    assert torch.equal(here[1].result(), sum_with(second, (4, 7)).result())


def test_another_number_of_rows_is_refused() -> None:
    """And nothing is taken of them."""
    here = [sum_with({}), sum_with({}, (4, 7))]
    with pytest.raises(errors.MessageInvalid, match="made 3 rows, not 2"):
        take_made(here, [4], torch.ones(3, 4).bfloat16())
    assert all(not one.result().any() for one in here)
