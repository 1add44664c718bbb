"""When a decode step looks ahead, and what it has seen then.

Planted faults seen red: a look while reads are waited for and nothing is computed yet, weights not
made to sum to what all do, a second look where the stream is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compute_node.kernels.variant_kernels import VariantKernels
from compute_node.moe.looks import Looks
from compute_node.moe.sums import OneTokenSum
from compute_node.predict.predictor import Seen
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey

STREAM = torch.full((1, 4), 2.0)


class Kernels:
    """Expert e makes (e, e, e, e) of any token."""

    def one_token(
        self, experts: Sequence[object], hidden: Tensor, gates: Sequence[float]
    ) -> Tensor:
        return torch.stack([e * g * torch.ones(4) for e, g in zip(experts, gates, strict=True)])

    def add_up(self, rows: Tensor) -> Tensor:
        return rows.sum(0, keepdim=True)


def partial_sum(*added: int) -> OneTokenSum:
    """Of experts 1, 2, and 4 with weights .25, .5, and .25."""
    one = OneTokenSum(VariantKernels(Kernels()), torch.ones(1, 4), {1: 0.25, 2: 0.5, 4: 0.25})  # type: ignore[arg-type]
    one.add([Borrowed(ExpertKey(3, e), 0, 0, 0, 0, e) for e in added])  # type: ignore[arg-type]
    return one


def looks(stream: Tensor | None, waits: bool, *sums: OneTokenSum) -> tuple[Looks, list[Seen]]:
    seen = list[Seen]()
    prefetcher = SimpleNamespace(
        guess=lambda one: seen.append(one) or [], is_worth_asking=lambda layer: True
    )
    return Looks(prefetcher, Seen(3, torch.ones(1, 4), stream), sums, waits), seen  # type: ignore[arg-type]


def test_a_partial_sum_stands_for_the_whole() -> None:
    """(1 x .25 + 2 x .5) x 1 / .75"""
    assert partial_sum(1, 2).so_far()[0].tolist() == pytest.approx([5 / 3] * 4)
    assert partial_sum().so_far()[0].tolist() == [0.0] * 4


def test_where_nothing_is_waited_for_it_looks_at_once_and_again_with_the_output() -> None:
    both, seen = looks(STREAM, False, partial_sum(1, 2, 4))
    both.next()
    assert seen[0].output is None
    both.next()
    assert seen[1].output is not None and seen[1].stream is STREAM
    assert seen[1].output[0].tolist() == [2.25] * 4


def test_while_reads_are_waited_for_it_looks_once_what_is_resident_was_computed() -> None:
    both, seen = looks(STREAM, True, partial_sum(1), partial_sum(4))
    assert both.next() == [] and not seen
    both.next()
    assert seen[0].output is not None
    assert seen[0].output[:, 0].tolist() == [1.0, 4.0], "a row a sequence"


@pytest.mark.parametrize("waits", [False, True])
def test_without_the_stream_it_looks_once_at_once(waits: bool) -> None:
    both, seen = looks(None, waits, partial_sum(1))
    both.next()
    both.next()
    assert [one.output for one in seen] == [None]
